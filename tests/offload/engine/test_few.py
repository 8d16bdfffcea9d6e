"""Quicker ways for few tokens on a CPU say what the model's own parts say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import offload
from offload.engine import few
from offload.engine.few import FewTokens
from offload.engine.handle import offload_of
from offload.generation.stream import forward
from tests.tiny import save_tiny

PROMPT = torch.arange(5, 25)[None]
BF16 = torch.bfloat16


class Parts(nn.Module):
    """What a model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 96, dtype=BF16)
        self.odd = nn.Linear(40, 8, dtype=BF16)  # no multiple of a kernel's columns
        self.norm = Qwen3MoeRMSNorm(64).to(BF16)
        self.other = GemmaRMSNorm(64).to(BF16)  # adds one to its weight
        self.plain = nn.LayerNorm(64, dtype=BF16)
        for norm in (self.norm, self.other):
            nn.init.normal_(norm.weight)


def replaced(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if "forward" in vars(part)}


def test_parts_are_told_by_what_they_compute_and_put_back() -> None:
    model = Parts()
    quick = FewTokens(model, [])
    assert replaced(model) == {"wide", "norm"}
    quick.close()
    assert not replaced(model)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_linear_layers_and_norms_say_the_same(tokens: int) -> None:
    model, x = Parts(), torch.randn(1, tokens, 64, dtype=BF16) * 3
    with torch.no_grad():
        expected = model.wide(x), model.norm(x)
        FewTokens(model, [])
        got = model.wide(x), model.norm(x)
    torch.testing.assert_close(got[0], expected[0], rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(got[1], expected[1], rtol=2**-7, atol=0)


def test_gradients_go_through_linear_layers_and_norms() -> None:
    model, x = Parts(), torch.randn(1, 64, dtype=BF16, requires_grad=True)
    FewTokens(model, [])
    (model.wide(x).sum() + model.norm(x).sum()).backward()
    assert x.grad is not None
    assert model.wide.weight.grad is not None


@pytest.mark.parametrize(("heads", "shared"), [(8, 4), (4, 1)])
def test_attention_of_one_token(heads: int, shared: int) -> None:
    module = Parts()
    module.num_key_value_groups = shared
    random = torch.Generator().manual_seed(1)
    query = torch.randn(1, heads, 1, 32, generator=random)
    key, value = (torch.randn(1, heads // shared, 50, 32, generator=random) for _ in range(2))
    theirs, _ = few._attention(module, query, key, value, None, scaling=0.2)
    few._attending.add(module)
    ours, _ = few._attention(module, query, key, value, None, scaling=0.2)
    assert ours.shape == theirs.shape == (1, 1, heads, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_tiny("qwen3_moe", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(checkpoint: Path, **options: object) -> PreTrainedModel:
    model, _ = offload.load(checkpoint, device="cpu", pack_dir=checkpoint.parent, **options)
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a prompt and of one step after it."""
    first, cache = forward(model, PROMPT, None)
    second, _ = forward(model, PROMPT[:, :1], cache)
    return torch.stack((first, second))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_without_expert_slots_nothing_is_copied_and_nothing_else_is_said(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    model = load(checkpoint, dtype=dtype)
    expected = logits(model)
    engine = offload_of(model).engine
    assert len(engine.transfer.slots) == 0
    stats = offload_of(model).stats()
    assert stats.bytes_loaded > 0
    assert stats.bytes_copied == 0
    for slots in ("100%", 5):
        other = load(checkpoint, dtype=dtype, expert_slots=slots)
        assert torch.equal(logits(other), expected)
        assert offload_of(other).stats().bytes_copied > 0


def test_few_experts_in_place_are_exchanged_as_in_slots(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM for a part of the experts: the policy decides which are read ahead."""
    expected = logits(load(checkpoint))
    size = offload_of(load(checkpoint)).engine.record_bytes(0)
    from offload.budget.budget import Budget

    monkeypatch.setattr(Budget, "slots", lambda self, asked: 5)
    model = load(checkpoint)
    assert offload_of(model).stats().slots == 5
    assert torch.equal(logits(model), expected)
    assert offload_of(model).stats().counts.loads > 5
    assert size > 0


def test_attention_prompts_and_masks_stay_transformers_own() -> None:
    module = Parts()
    few._attending.add(module)
    query, key = torch.randn(2, 1, 4, 3, 16)
    ours, _ = few._attention(module, query, key, key, None, scaling=0.25, is_causal=True)
    exact = functional.scaled_dot_product_attention(query, key, key, scale=0.25, is_causal=True)
    assert torch.equal(ours, exact.transpose(1, 2))
