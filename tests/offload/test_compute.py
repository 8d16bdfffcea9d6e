"""Both ways to compute experts give the same answers, through the whole engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import offload
import offload.compute as module
import offload.loading
from offload.compute import Grouped, OneByOne
from offload.handle import offload_of
from tests.tiny import K, save_tiny

PROMPT = torch.arange(5, 14)[None]


@torch.inference_mode()
def _logits(folder: Path, monkeypatch: pytest.MonkeyPatch, way: type, **options: object) -> Tensor:
    """Of a prompt and two steps."""
    monkeypatch.setattr(offload.loading, "OneByOne", way)
    model, _ = offload.load(folder / "checkpoint", device="cpu", pack_dir=folder, **options)
    out = model(input_ids=PROMPT, use_cache=True)
    logits = [out.logits]
    for token in (9, 77):
        ids = torch.tensor([[token]])
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    offload_of(model).close()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_grouped_kernels_answer_as_one_by_one_at_every_residency(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint", num_hidden_layers=1)
    expected = _logits(tmp_path, monkeypatch, OneByOne)
    called = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *a: called.append(1) or decode(*a))
    all_here = _logits(tmp_path, monkeypatch, Grouped)
    assert called
    torch.testing.assert_close(all_here, expected, rtol=1e-4, atol=1e-4)
    few = _logits(tmp_path, monkeypatch, Grouped, expert_slots=K)
    assert torch.equal(few, all_here)
