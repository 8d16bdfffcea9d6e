"""A step that fails leaves nothing wrong behind; `close` leaves nothing at all."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import offload
import offload.cache.cache as cache_module
import offload.cache.slots as slots_module
import offload.engine.ahead as ahead_module
import offload.engine.engine as engine_module
import offload.engine.host as host_module
import offload.engine.layer as layer_module
from offload.engine.handle import offload_of
from offload.engine.layer import Layer
from offload.quant.errors import OffloadError
from tests.tiny import EXPERTS, LAYERS, save_tiny

PROMPT = torch.arange(5, 25)[None]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[PreTrainedModel]:
    save_tiny("mixtral", tmp_path / "checkpoint")
    loaded, _ = offload.load(
        tmp_path / "checkpoint",
        device="cpu",
        expert_slots=5,
        lookahead=True,
        pack_dir=tmp_path / "packs",
    )
    yield loaded
    offload_of(loaded).close()


def _tokens(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("moments", [15, pytest.param(150, marks=pytest.mark.long)])
def test_interruption_at_any_line_does_not_change_later_answers(
    moments: int, model: PreTrainedModel
) -> None:
    """Ctrl-C can come between any two lines of the engine and the cache."""
    expected = _tokens(model)
    modules = (engine_module, host_module, ahead_module, layer_module, cache_module, slots_module)
    files = {module.__file__ for module in modules}
    total = _lines_run(model, files, stop_at=None)
    total -= total // 10  # fewer lines run when copies are quicker
    for line in range(1, total, max(1, total // moments)):
        with pytest.raises(KeyboardInterrupt):
            _lines_run(model, files, stop_at=line)
        assert torch.equal(_tokens(model), expected), f"interrupted at line event {line}"
        offload_of(model).engine.cache.check_integrity()


def _lines_run(model: PreTrainedModel, files: set[str | None], stop_at: int | None) -> int:
    """Run the model, count the lines of `files` that are run, and interrupt at one of them."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        _tokens(model)
    finally:
        sys.settrace(None)
    return count


def test_two_threads_may_use_one_model(model: PreTrainedModel) -> None:
    prompts = [torch.arange(5 + i, 25 + i)[None] for i in range(2)]
    with torch.inference_mode():
        expected = [model(prompt).logits for prompt in prompts]
    wrong = []

    def run(index: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(model(prompts[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_look_ahead_does_not_show_in_recorded_router_logits(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        out = model(PROMPT[:, :1], output_router_logits=True)
    assert len(out.router_logits) == LAYERS


def test_saving_without_experts_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="pack"):
        model.save_pretrained(tmp_path / "saved")


def test_a_dropped_model_leaves_no_thread(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    before = set(threading.enumerate())
    loaded, _ = offload.load(tmp_path / "checkpoint", device="cpu", pack_dir=tmp_path / "packs")
    copying = {at for at in set(threading.enumerate()) - before if at.name == "offload-copy"}
    assert len(copying) == 1
    del loaded
    gc.collect()
    assert not copying & set(threading.enumerate())


def test_wrong_guesses_do_not_change_answers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _tokens(model)
    monkeypatch.setattr(
        "offload.cache.guesses.ENOUGH", -1.0
    )  # they may load although they are wrong
    guesses = random.Random(1)
    monkeypatch.setattr(
        Layer, "guess", lambda self, hidden: guesses.sample(range(EXPERTS), 4), raising=True
    )
    assert torch.equal(_tokens(model), expected)
    counts = offload_of(model).stats().counts
    assert counts.lookahead_loads > counts.lookahead_loads_right


def test_statistics_agree_with_each_other(model: PreTrainedModel) -> None:
    before = offload_of(model).stats()
    _tokens(model)
    stats = offload_of(model).stats() - before
    counts = stats.counts
    record_bytes = offload_of(model).engine.record_bytes(0)
    assert counts.hits + counts.misses == counts.requests
    assert stats.bytes_loaded == counts.loads * record_bytes
    assert stats.tokens == PROMPT.numel() + 11
    assert sum(layer.requests for layer in stats.layers) == counts.requests


def test_sentinel_index_is_skipped(model: PreTrainedModel) -> None:
    layer = offload_of(model).engine.layers[0]
    hidden = torch.randn(3, 64)
    index = torch.tensor([[1, EXPERTS], [EXPERTS, EXPERTS], [2, 1]])
    weights = torch.full((3, 2), 0.5)
    out = layer(hidden, index, weights)
    alone = layer(hidden[:1], torch.tensor([[1]]), torch.tensor([[0.5]]))
    assert torch.allclose(out[0], alone[0], atol=1e-6)
    assert torch.equal(out[1], torch.zeros(64))


def test_experts_are_not_in_the_module_tree(model: PreTrainedModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert not any("experts" in name for name in names)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, nn.Module)


def test_close_frees_threads_and_files(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    before = _mapped_packs()
    options = {"device": "cpu", "pack_dir": tmp_path / "packs"}
    for _ in range(2):  # the first time libraries open things of their own
        threads = threading.active_count()
        loaded, _ = offload.load(tmp_path / "checkpoint", **options)
        _tokens(loaded)
        offload_of(loaded).close()
        offload_of(loaded).close()  # twice is once
        del loaded
        assert threading.active_count() == threads
    assert _mapped_packs() == before


def _mapped_packs() -> set[str]:
    return {m.path for m in psutil.Process().memory_maps() if "experts-" in m.path}
