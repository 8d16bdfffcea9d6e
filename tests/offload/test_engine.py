"""A step that fails leaves nothing wrong behind; `close` leaves nothing at all."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import offload
from offload.engine import Layer
from offload.handle import offload_of
from quant.record import MatrixView
from tests.tiny import EXPERTS, save_tiny

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


def test_interrupted_steps_do_not_change_later_answers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _tokens(model)
    compute = Layer.expert
    moments = random.Random(0)
    for _ in range(25):
        left = moments.randrange(1, 60)

        def interrupted(self: Layer, x: Tensor, matrices: dict[str, MatrixView]) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return compute(self, x, matrices)

        monkeypatch.setattr(Layer, "expert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _tokens(model)
        monkeypatch.setattr(Layer, "expert", compute)
        offload_of(model).engine.cache.check_integrity()
        assert torch.equal(_tokens(model), expected)


def test_wrong_guesses_do_not_change_answers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _tokens(model)
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
