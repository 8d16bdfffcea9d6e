"""A live run as a timeline: valid, complete, and nothing is recorded when nobody asked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.engine.handle import offload_of
from offload.quant.errors import OffloadError
from offload.ranges import recorded, work
from offload.trace.timeline import record_timeline
from tests.full_disk import full_beyond
from tests.tiny import LAYERS, save_tiny

PROMPT = torch.arange(5, 25)[None]
OURS = re.compile(r"(decision|wait|experts|dense|copy|guess) layer (\d+)(?: expert (.+))?")


class Range(NamedTuple):
    """One of our ranges in a trace; times in microseconds."""

    name: str
    layer: int
    experts: tuple[int, ...]
    begin: float
    end: float
    thread: int


def ranges_in(file: Path) -> list[Range]:
    """Our ranges in the order in which they began."""
    found = []
    for event in json.loads(file.read_text())["traceEvents"]:
        said = OURS.fullmatch(event["name"])
        if event["ph"] != "X" or said is None:
            continue
        name, layer, experts = said.groups()
        numbers = tuple(map(int, experts.split(", "))) if experts else ()
        end = event["ts"] + event["dur"]
        found.append(Range(name, int(layer), numbers, event["ts"], end, event["tid"]))
    return sorted(found, key=lambda at: at.begin)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    save_tiny("mixtral", folder / "checkpoint")
    model, _ = offload.load(
        folder / "checkpoint", expert_slots=5, pack_dir=folder / "packs", **options
    )
    return model


@pytest.fixture
def model(tmp_path: Path) -> Iterator[PreTrainedModel]:
    loaded = load(tmp_path, device="cpu")
    yield loaded
    offload_of(loaded).close()


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"gpus": ("cpu", "cpu")}], ids=["one", "two"])
def test_every_copy_and_every_layer_is_in_it(where: dict[str, Any], tmp_path: Path) -> None:
    model, file = load(tmp_path, **where), tmp_path / "timeline.json"
    before = offload_of(model).stats()
    with record_timeline(model, file):
        model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    counts = (offload_of(model).stats() - before).counts
    found = ranges_in(file)
    copies = [at for at in found if at.name in ("copy", "guess")]
    assert len(copies) == counts.loads
    experts = [at for at in found if at.name == "experts"]
    assert sum(len(at.experts) for at in experts) == counts.requests
    for name in ("decision", "dense", "experts"):
        assert {at.layer for at in found if at.name == name} == set(range(LAYERS))
    assert not {at.thread for at in copies} & {at.thread for at in found if at.name == "experts"}
    offload_of(model).close()


def test_ranges_come_in_the_order_of_the_work(model: PreTrainedModel, tmp_path: Path) -> None:
    """In each call of a layer: dense, decision, then waits and experts; an expert is computed after
    the copy of its record has ended."""
    file = tmp_path / "timeline.json"
    with record_timeline(model, file):
        model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    found = ranges_in(file)
    main = [at for at in found if at.name not in ("copy", "guess")]
    letters = "".join(at.name[0] for at in main)
    assert re.fullmatch(r"(?:dd(?:w*e)+)+d", letters), letters
    for earlier, later in itertools.pairwise(main):
        assert earlier.end <= later.begin
    ended: dict[tuple[int, int], float] = {}  # layer, expert -> when its first copy had ended
    for at in found:
        if at.name in ("copy", "guess"):
            ended.setdefault((at.layer, at.experts[0]), at.end)
    for at in main:
        if at.name == "experts":
            assert all(ended.get((at.layer, expert), 0.0) <= at.begin for expert in at.experts)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_breaks_off_is_written_too(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "timeline.json"
    with monkeypatch.context() as patch:
        patch.setattr(offload_of(model).engine.layers[1], "expert", interrupt)
        with pytest.raises(KeyboardInterrupt), record_timeline(model, file):
            model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert {at.layer for at in ranges_in(file) if at.name == "decision"} == {0, 1}
    assert not recorded()
    again = tmp_path / "again.json"
    with record_timeline(model, again):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert {at.layer for at in ranges_in(again) if at.name == "decision"} == set(range(LAYERS))


def test_nothing_is_recorded_unasked(model: PreTrainedModel) -> None:
    with record_timeline(model, None):
        assert not recorded()
        assert work("copy", 0, 1) is work("wait", 2)


def test_the_profiler_writes_nothing_to_the_terminal(
    model: PreTrainedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with record_timeline(model, tmp_path / "timeline.json"):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert capfd.readouterr() == ("", "")


def test_only_the_file_that_was_named_is_left(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("timeline.json", "timeline", "timeline.gz"):
        file = tmp_path / "out" / name
        file.write_text('{"moe-offload": "an earlier one"}')
        with record_timeline(model, file):
            model.generate(PROMPT, max_new_tokens=2, do_sample=False)
        assert ranges_in(file)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_link_stays_a_link_to_the_timeline(model: PreTrainedModel, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "timeline.json")
    with record_timeline(model, link):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert link.is_symlink()
    assert ranges_in(tmp_path / "timeline.json")


def test_a_place_that_cannot_be_written_is_told_first(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    for file in (tmp_path, tmp_path / "missing" / "a.json"):
        with pytest.raises(OffloadError, match="name "), record_timeline(model, file):
            pytest.fail("nothing may run")


@pytest.mark.parametrize("most", [0, 8, 4096])
def test_a_timeline_that_a_full_disk_cuts_leaves_the_earlier_one_and_no_other_file(
    most: int, model: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    file, earlier = tmp_path / "out" / "timeline.json", '{"moe-offload": "an earlier one"}'
    file.write_text(earlier)
    with (
        full_beyond(most),
        pytest.raises(OffloadError, match=r"the disk is full|too large"),
        record_timeline(model, file),
    ):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert [(each.name, each.read_text()) for each in file.parent.iterdir()] == [
        ("timeline.json", earlier)
    ]


def test_a_profiler_that_fails_leaves_no_file(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, part: str) -> None:
        Path(part).write_text("{")
        raise RuntimeError("no trace")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fail)
    with (
        pytest.raises(OffloadError, match="no trace"),
        record_timeline(model, tmp_path / "out" / "timeline.json"),
    ):
        pass
    assert not list((tmp_path / "out").iterdir())
