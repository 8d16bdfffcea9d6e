"""Both ways to compute experts give the same answers, through the whole engine."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import offload
import offload.budget.resolve
import offload.engine.compute as module
import offload.engine.engine
from offload.engine.compute import Grouped, OneByOne
from offload.engine.handle import offload_of
from offload.quant.pack import Pack
from offload.transfer import cards as per_card
from offload.transfer.host import HostTransfer
from tests.interpreter import quicken
from tests.tiny import K, save_tiny

quicken()
PROMPT = torch.arange(5, 11)[None]


def _with_staging(pack: Pack, slots: int, rows: int, **_: object) -> HostTransfer:
    return HostTransfer(pack, slots + rows)


@torch.inference_mode()
def _logits(folder: Path, monkeypatch: pytest.MonkeyPatch, way: type, **options: object) -> Tensor:
    """The logits of a prompt and of one step."""
    monkeypatch.setattr(offload.engine.engine, "compute_of", way)
    if way is Grouped:  # as on a GPU, streamed experts have rows of their own
        copied = functools.partial(_with_staging, rows=4)
        monkeypatch.setattr(per_card, "HostTransfer", copied)
        monkeypatch.setattr(offload.budget.resolve, "staging_rows", lambda *_: 4)
    model, _ = offload.load(folder / "checkpoint", device="cpu", pack_dir=folder, **options)
    out = model(input_ids=PROMPT, use_cache=True)
    last = model(input_ids=PROMPT[:, :1], cache=out.cache, use_cache=True)
    offload_of(model).close()
    return torch.cat([out.logits, last.logits], dim=1)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_grouped_kernels_answer_as_one_by_one_at_every_residency(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint", num_hidden_layers=1, intermediate_size=32)
    expected = _logits(tmp_path, monkeypatch, OneByOne)
    called = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *a: called.append(1) or decode(*a))
    all_here = _logits(tmp_path, monkeypatch, Grouped)
    assert called
    torch.testing.assert_close(all_here, expected, rtol=1e-4, atol=1e-4)
    few = _logits(tmp_path, monkeypatch, Grouped, expert_slots=K)
    assert torch.equal(few, all_here), "some streamed, several of them at once"
