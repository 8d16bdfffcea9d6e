"""Which figures pass or fail a baseline, and which baseline files are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload import OffloadError, QualityError, SourceError
from offload.quality.baseline import (
    TOLERANCES,
    Tolerance,
    baseline_of,
    read_baseline,
    save_baseline,
)
from offload.quality.check import CheckResult, MeasuredModel, Prompts
from offload.quality.comparison import Comparison
from offload.quality.scoring import Estimate, Sliding

MODEL = MeasuredModel("tiny", "mixtral", 3, 64, 320, {"expert_bits": 4})
FIGURES = Comparison(
    tokens=700,
    kl_mean=Estimate(0.05, 0.004),
    kl_median=0.02,
    kl_p99=0.4,
    kl_max=1.2,
    top1_agreement=Estimate(0.9, 0.01),
    perplexity=Estimate(10.2, 0.9),
    reference_perplexity=Estimate(10.0, 0.9),
    perplexity_ratio=Estimate(1.02, 0.004),
)
RESULT = CheckResult(
    MODEL, MODEL, Prompts(("a",), ("text",)), Sliding(512, 256), FIGURES, (FIGURES,)
)


def with_figures(**figures: Any) -> CheckResult:
    return replace(RESULT, overall=replace(FIGURES, **figures))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A baseline file made from `RESULT`."""
    save_baseline(tmp_path / "baseline.json", RESULT)
    return tmp_path / "baseline.json"


@pytest.fixture
def edit(file: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """A function that edits the JSON object in the file."""

    def edit_(change: Callable[[dict[str, Any]], object]) -> Path:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
        return file

    return edit_


Edit = Callable[[Callable[[dict[str, Any]], object]], Path]


# --- passing and failing -------------------------------------------------------------------------


def test_the_same_figures_pass(file: Path) -> None:
    assert read_baseline(file).worse(RESULT) == ()


def test_better_figures_pass(file: Path) -> None:
    better = with_figures(
        kl_mean=Estimate(0.01, 0),
        kl_max=0.2,
        top1_agreement=Estimate(0.99, 0),
        perplexity_ratio=Estimate(1, 0),
    )
    assert read_baseline(file).worse(better) == ()


@pytest.mark.parametrize(
    ("field", "within", "beyond"),
    [
        ("kl_mean", 0.0569, 0.0571),  # 0.05 * 1.1 + 0.002
        ("kl_median", 0.0249, 0.0251),
        ("kl_p99", 0.539, 0.541),
        ("kl_max", 2.449, 2.451),
        ("top1_agreement", 0.8701, 0.8699),
        ("perplexity_ratio", 1.0301, 1.0303),
    ],
)
def test_each_figure_has_its_own_tolerance(
    field: str, within: float, beyond: float, file: Path
) -> None:
    def worse(value: float) -> list[str]:
        wide = isinstance(getattr(FIGURES, field), Estimate)
        result = with_figures(**{field: Estimate(value, 0.0) if wide else value})
        return [change.figure for change in read_baseline(file).worse(result)]

    assert worse(within) == []
    assert worse(beyond) == [field]


def test_a_change_names_the_old_value_and_the_limit(file: Path) -> None:
    result = with_figures(kl_mean=Estimate(0.5, 0), top1_agreement=Estimate(0.5, 0))
    changes = [str(change) for change in read_baseline(file).worse(result)]
    assert changes == [
        "kl_mean 0.5 (at most 0.057 allowed, was 0.05)",
        "top1_agreement 0.5 (at least 0.87 allowed, was 0.9)",
    ]


def test_nan_is_worse_than_anything(file: Path) -> None:
    for value in (math.nan, math.inf):
        changes = read_baseline(file).worse(with_figures(kl_max=value))
        assert [change.figure for change in changes] == ["kl_max"]
    assert len(read_baseline(file).worse(with_figures(top1_agreement=Estimate(math.nan, 0)))) == 1


def test_tolerances_come_from_the_file(edit: Edit) -> None:
    def strict(data: dict[str, Any]) -> None:
        data["tolerances"]["kl_mean"] = {"relative": 0, "absolute": 0.001}

    baseline = read_baseline(edit(strict))
    assert baseline.tolerances == TOLERANCES | {"kl_mean": Tolerance(absolute=0.001)}
    changes = baseline.worse(with_figures(kl_mean=Estimate(0.0511, 0)))
    assert [change.limit for change in changes] == [pytest.approx(0.051)]


def test_a_model_with_other_bits_can_be_compared(file: Path) -> None:
    other = replace(MODEL, settings={"expert_bits": 2})
    assert read_baseline(file).worse(replace(RESULT, model=other)) == ()


def test_a_perplexity_below_the_references_need_not_be_reached_again(file: Path) -> None:
    save_baseline(file, with_figures(perplexity_ratio=Estimate(0.94, 0)))
    assert read_baseline(file).worse(with_figures(perplexity_ratio=Estimate(1.0099, 0))) == ()
    changes = read_baseline(file).worse(with_figures(perplexity_ratio=Estimate(1.0101, 0)))
    assert [change.limit for change in changes] == [pytest.approx(1.01)]


# --- what is not about the same ------------------------------------------------------------------

OTHERS = {
    "another model: name": replace(RESULT, model=replace(MODEL, name="other")),
    "another model: layers": replace(RESULT, model=replace(MODEL, layers=4)),
    "another reference: name": replace(RESULT, reference=replace(MODEL, name="other")),
    "another reference: weights": with_figures(reference_perplexity=Estimate(10.2, 0.9)),
    "another set of prompts": replace(RESULT, prompts=Prompts(("a",), ("Text",))),
    "another window and stride": replace(RESULT, sliding=Sliding(512, 128)),
    "another number of tokens": with_figures(tokens=699),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_baseline_of_something_else_is_refused(what: str, file: Path) -> None:
    with pytest.raises(QualityError, match=f"is of {what.partition(':')[0]} "):
        read_baseline(file).worse(OTHERS[what])


def test_the_reference_may_round_differently_on_another_processor(file: Path) -> None:
    assert read_baseline(file).worse(with_figures(reference_perplexity=Estimate(10.01, 0))) == ()


# --- files that may not be believed --------------------------------------------------------------


def put(*path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """An edit that sets the value at `path`, or removes it for None."""

    def change(data: dict[str, Any]) -> None:
        *folders, last = path
        for name in folders:
            data = data[name]
        if value is None:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize("name", [*TOLERANCES, "tokens", "reference_perplexity"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.1", [], {}])
def test_a_figure_that_is_missing_or_not_a_number_is_refused(
    name: str, value: object, edit: Edit
) -> None:
    with pytest.raises(QualityError, match=r"not a usable baseline.*--save-baseline"):
        read_baseline(edit(put("figures", name, value=value)))


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -0.1, "1", True])
@pytest.mark.parametrize("part", ["relative", "absolute"])
def test_a_tolerance_that_is_missing_or_not_a_number_is_refused(
    name: str, value: object, part: str, edit: Edit
) -> None:
    with pytest.raises(QualityError, match="not a usable baseline"):
        read_baseline(edit(put("tolerances", name, part, value=value)))


@pytest.mark.parametrize(
    "key",
    ["format", "version", "model", "reference", "prompts", "window", "stride", "figures",
     "tolerances"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, [], {}, "x"])
def test_a_part_that_is_missing_or_of_the_wrong_type_is_refused(
    key: str, value: object, edit: Edit
) -> None:
    with pytest.raises(QualityError, match="not a usable baseline"):
        read_baseline(edit(put(key, value=value)))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 9999, b"[" * 99999, b"not json"]
)
def test_garbage_is_refused(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(OffloadError, match=r"not a usable baseline|not UTF-8"):
        read_baseline(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(SourceError, match="cannot read the baseline"):
            read_baseline(path)


# --- saving --------------------------------------------------------------------------------------


def test_the_file_is_for_people(file: Path) -> None:
    text = file.read_text()
    assert text.startswith('{\n  "format": "moe-offload quality baseline",\n')
    data = json.loads(text)
    assert data == baseline_of(RESULT)
    assert data["model"]["settings"] == {"expert_bits": 4}
    assert {"moe-offload", "torch", "transformers"} <= data["made_with"].keys()
    assert data["figures"]["kl_mean"] == 0.05
    assert set(data["tolerances"]) == set(TOLERANCES)


def test_a_baseline_that_cannot_be_written_leaves_the_old_one(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OffloadError, match=r"cannot write the baseline.*No space"):
        save_baseline(file, with_figures(kl_max=9.0))
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
