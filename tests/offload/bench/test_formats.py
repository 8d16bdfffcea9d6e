"""How rows are written: as tables, CSV, JSON, JSON lines and pictures, and compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from offload.bench.compare import EarlierRun, read_earlier
from offload.bench.output import (
    WRITERS,
    save_picture,
    write_csv,
    write_json,
    write_jsonl,
    write_tables,
)
from offload.bench.row import BenchRow, Test
from offload.options import LoadOptions
from offload.pictures import check_picture
from offload.quant.errors import OffloadError
from tests.offload.bench.rows import row

TESTS = [Test(8, 0), Test(0, 4)]


def tables(
    rows: list[BenchRow], settings: list[LoadOptions], columns: int | None = None
) -> list[str]:
    out = io.StringIO()
    write_tables(rows, out, tests=TESTS, settings=settings, columns=columns)
    return out.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_lines_of_a_table_are_equally_long() -> None:
    lines = tables([row(Test(8, 0)), row()], [LoadOptions()])
    first, second = lines[:4], lines[5:]
    assert lines[4] == ""
    assert len({len(line) for line in first}) == len({len(line) for line in second}) == 1


def test_the_second_table_holds_times_memory_and_bounds() -> None:
    lines = tables([row(Test(8, 0)), row()], [LoadOptions()])
    assert cells(lines[5])[1:] == [
        "test", "first ms", "p50 ms", "p95", "p99", "peak GiB", "bound t/s", "reached",
    ]  # fmt: skip
    assert cells(lines[7])[1:6] == ["pp8", "5.0", "-", "-", "-"]
    assert cells(lines[8])[1:4] == ["tg4", "-", "10.0"]


def test_a_swept_option_has_a_column() -> None:
    settings = [LoadOptions(policy="lru"), LoadOptions(policy="lfru")]
    lines = tables([row(policy="lru"), row(policy="lfru")], settings)
    assert cells(lines[0])[4:6] == ["policy", "test"]
    assert [cells(line)[4] for line in lines[2:4]] == ["lru", "lfru"]
    assert "look-ahead" not in lines[0]
    lines = tables(
        [row(lookahead=True)], [LoadOptions(lookahead=True), LoadOptions(lookahead=False)]
    )
    assert cells(lines[2])[4] == "on"


def test_a_narrow_terminal_has_the_model_above_its_rows() -> None:
    rows = [row(bits="q8"), row(bits="q8"), row(bits="q4")]
    lines = tables(rows, [LoadOptions(expert_bits=8), LoadOptions(expert_bits=4)], columns=90)
    assert all(len(line) <= 90 for line in lines)
    assert lines[0] == "tiny q8, 1.00 GiB, 1.00 B, CPU"
    assert lines.count("tiny q4, 1.00 GiB, 1.00 B, CPU") == 2  # in both tables
    assert cells(lines[2])[0] == "test"


def as_json(one: BenchRow) -> dict[str, Any]:
    """The row as JSON gives it back, which has lists and no tuples."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(one)))
    return values


def test_csv_has_llama_benchs_quotes_and_no_samples() -> None:
    out = io.StringIO()

    def rows() -> Iterator[BenchRow]:
        yield row()
        assert len(out.getvalue().splitlines()) == 2  # a row is written as soon as it is measured
        yield row(Test(8, 0), lookahead=False)

    write_csv(rows(), out)
    assert out.getvalue().startswith('"build","cpu_info"')
    decode, prefill = csv.DictReader(io.StringIO(out.getvalue()))
    assert decode["n_gen"] == "4"
    assert "samples_ns" not in decode
    assert (decode["lookahead"], prefill["lookahead"]) == ("", "0")


def test_jsonl_has_one_row_per_line() -> None:
    out = io.StringIO()

    def rows() -> Iterator[BenchRow]:
        yield row()
        assert json.loads(out.getvalue()) == as_json(row())
        yield row(Test(8, 0))

    write_jsonl(rows(), out)
    assert len(out.getvalue().splitlines()) == 2


def test_json_is_whole_even_if_a_run_breaks_off() -> None:
    out = io.StringIO()

    def rows() -> Iterator[BenchRow]:
        yield row()
        yield row(Test(8, 0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_json(rows(), out)
    assert json.loads(out.getvalue()) == [as_json(row()), as_json(row(Test(8, 0)))]
    empty = io.StringIO()
    write_json([], empty)
    assert json.loads(empty.getvalue()) == []


# --- --compare -----------------------------------------------------------------------------------


def test_the_error_of_a_ratio_comes_from_both_runs() -> None:
    then = {**as_json(row(token_ms=(20, 20, 20, 20))), "stddev_ts": 5.0}  # of 50 t/s: 10%
    ratio = EarlierRun((then,)).ratio(row())
    assert ratio is not None
    assert ratio.value == pytest.approx(2)
    assert ratio.error == pytest.approx(0.2)
    assert str(ratio) == "2.00 ± 0.20"


def test_a_row_is_compared_with_the_earlier_row_of_the_nearest_settings() -> None:
    earlier = EarlierRun(
        (
            as_json(row(policy="lru", token_ms=(20, 20, 20, 20))),
            as_json(row(policy="lfru", token_ms=(40, 40, 40, 40))),
            as_json(row(Test(8, 0))),
        )
    )

    def value(now: BenchRow) -> float | None:
        ratio = earlier.ratio(now)
        return None if ratio is None else ratio.value

    assert value(row(policy="lru")) == pytest.approx(2)
    assert value(row(policy="lfru")) == pytest.approx(4)
    assert value(row(policy="lru", slots=12)) == pytest.approx(2)  # the nearest
    assert value(row(policy="fifo")) is None  # as near to both
    assert value(row(Test(16, 0))) is None


def test_the_reason_for_no_ratio_names_the_rows_of_the_file() -> None:
    earlier = EarlierRun(
        (
            as_json(row(policy="lru")),
            as_json(row(policy="lfru")),
            as_json(row(Test(8, 0))),
        )
    )
    assert earlier.why_none(row(policy="lru")) == ""
    absent = earlier.why_none(row(Test(16, 0)))
    assert "no row to compare with model=tiny text=real n_prompt=16 " in absent
    assert "n_prompt=8 n_gen=0" in absent
    assert "n_prompt=0 n_gen=4" in absent
    assert "-p, -n" in absent
    unclear = earlier.why_none(row(policy="fifo"))
    assert "policy=lru; policy=lfru; measure with the settings of one of them" in unclear
    twice = EarlierRun((as_json(row()), as_json(row())))
    assert "all are alike" in twice.why_none(row())
    assert "\n" not in absent + unclear
    many = EarlierRun(tuple(as_json(row(Test(8 + at, 0))) for at in range(9)))
    assert "and 5 more" in many.why_none(row())


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_json_that_was_written_can_be_compared_with(kind: str, tmp_path: Path) -> None:
    out = io.StringIO()
    WRITERS[kind]([row()], out)
    file = tmp_path / "rows"
    file.write_text(out.getvalue())
    ratio = read_earlier(file).ratio(row())
    assert ratio is not None
    assert ratio.value == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[1]", "[{}]", "\0", '[{"model": 1}]', "[" * 100_000]
    + [
        json.dumps([{**as_json(row()), "avg_ts": bad}])
        for bad in (0, 10**400, "fast", None, float("nan"))
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(OffloadError, match="name a file that offload bench -o json wrote"):
        read_earlier(file)
    with pytest.raises(OffloadError, match="cannot compare"):
        read_earlier(tmp_path / "missing.json")


# --- --plot --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "begin"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_picture_of_a_sweep_has_the_format_of_its_ending_and_may_be_drawn_again(
    ending: str, begin: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(test, slots=slots, policy=policy)
        for policy in ("lru", "lfru")
        for slots in (24, 6)
        for test in TESTS
    ]
    file = tmp_path / f"speed.{ending}"
    for said in ("", f"the earlier picture in {file} is replaced"):
        caplog.clear()
        check_picture(file, "--plot")
        save_picture(rows, file)
        assert file.read_bytes().startswith(begin)
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize("name", ["no/speed.png", ".", "speed.jpg", "speed", "theirs.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "theirs.png").write_bytes(b"\x89PNG\r\n of a holiday")
    with pytest.raises(OffloadError, match=r"cannot write|end it in|was not written as a picture"):
        check_picture(tmp_path / name, "--plot")
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.png"]
