"""Quantised logits are bit-equal over every cache setting, and batches equal transformers'."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import offload
from offload.engine.handle import offload_of
from offload.generation.stream import stream_generate
from offload.options import POLICIES
from tests.tiny import EXPERTS, LAYERS, K, save_tiny


@torch.inference_mode()
def _logits(folder: Path, steps: int = 12, **options: object) -> Tensor:
    model, _ = offload.load(
        folder / "checkpoint", device="cpu", pack_dir=folder / "packs", **options
    )
    prompt = torch.randint(3, 120, (2, 17), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=prompt, use_cache=True)
    logits = [out.logits]
    for step in range(steps):
        token = (prompt[:, :1] * 7 + step * 13) % 120 + 3
        out = model(input_ids=token, cache=out.cache, use_cache=True)
        logits.append(out.logits)
    offload_of(model).engine.cache.check_integrity()
    offload_of(model).close()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_bit_equal_at_every_cache_setting(
    model_type: str, dtype: torch.dtype, bits: int, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint", dtype=dtype)
    expected = _logits(tmp_path, expert_bits=bits, dtype=dtype)
    slots = (1, K, EXPERTS * LAYERS // 2)
    for count, lookahead, policy in itertools.product(slots, (True, False), POLICIES):
        got = _logits(
            tmp_path,
            expert_bits=bits,
            dtype=dtype,
            expert_slots=count,
            lookahead=lookahead,
            policy=policy,
        )
        assert torch.equal(got, expected), f"{count} slots, look-ahead {lookahead}, {policy}"


def test_quantised_logits_stay_near_the_unquantised_ones(tmp_path: Path) -> None:
    # every expert is chosen, so that rounding cannot change the routing
    save_tiny("mixtral", tmp_path / "checkpoint", num_experts_per_tok=EXPERTS)
    exact = _logits(tmp_path, expert_bits=16)
    error = {
        bits: float((_logits(tmp_path, expert_bits=bits) - exact).norm() / exact.norm())
        for bits in (4, 8)
    }
    assert error[8] < 0.02
    assert error[4] < 0.25
    assert error[8] < error[4] / 4


def test_left_padded_batch_gives_transformers_tokens(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    model, _ = offload.load(
        tmp_path / "checkpoint",
        device="cpu",
        expert_bits=16,
        expert_slots=5,
        pack_dir=tmp_path / "packs",
    )
    ids = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    offload_of(model).close()


def test_generate_of_transformers_gives_our_greedy_tokens(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "checkpoint", dtype=torch.bfloat16)
    model, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", expert_slots=6, pack_dir=tmp_path / "packs"
    )
    prompt = list(range(5, 30))
    ours = [step.token for step in stream_generate(model, None, prompt, max_new_tokens=24)]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert theirs[0, len(prompt) :].tolist() == ours
    offload_of(model).close()
