"""A live run as a timeline: valid, complete, and nothing is recorded when nobody asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from offload.quant.errors import OffloadError
from transformers import PreTrainedModel

import offload
from offload.engine.handle import offload_of
from offload.trace.timeline import recording
from offload.transfer.base import NO_MARKS
from tests.cache.chrome import check_chrome_trace
from tests.tiny import LAYERS, save_tiny

PROMPT = torch.arange(5, 25)[None]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[PreTrainedModel]:
    save_tiny("mixtral", tmp_path / "checkpoint")
    loaded, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", expert_slots=5, pack_dir=tmp_path / "packs"
    )
    yield loaded
    offload_of(loaded).close()


def test_every_copy_and_every_layer_is_in_it(model: PreTrainedModel, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    before = offload_of(model).stats()
    with recording(model, file):
        model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    counts = (offload_of(model).stats() - before).counts
    content = json.loads(file.read_text())
    check_chrome_trace(content)
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    tracks = {e["args"]["name"]: e["tid"] for e in content["traceEvents"] if e["ph"] == "M"}
    copies = [span for span in spans if span["tid"] == tracks["link"]]
    assert len(copies) == pytest.approx(counts.loads, abs=2)  # the last ones may still be under way
    compute = [span for span in spans if span["tid"] == tracks["compute"]]
    assert {span["args"]["layer"] for span in compute} == set(range(LAYERS))
    assert sum("expert" in span["args"] for span in compute) == counts.requests


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_breaks_off_is_written_too(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "timeline.json"
    layer = offload_of(model).engine.layers[1]
    monkeypatch.setattr(layer, "expert", interrupt)
    with pytest.raises(KeyboardInterrupt), recording(model, file):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    check_chrome_trace(json.loads(file.read_text()))
    assert offload_of(model).engine.transfer.marks is NO_MARKS


def test_nothing_is_recorded_unasked(model: PreTrainedModel) -> None:
    with recording(model, None):
        assert offload_of(model).engine.transfer.marks is NO_MARKS


def test_a_place_that_cannot_be_written_is_told_first(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    for file in (tmp_path, tmp_path / "missing" / "a.json"):
        with pytest.raises(OffloadError, match="cannot write"), recording(model, file):
            pytest.fail("nothing may run")
