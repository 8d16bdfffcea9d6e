"""Our logits are transformers' own, for every architecture, cache size and look-ahead setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload.engine.handle import offload_of
from tests.tiny import EXPERTS, K, save_tiny

TOLERANCE = 1e-5  # largest absolute difference of logits of magnitude 2 to 4
DECODE_STEPS = 8

NAMED = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_5_moe",
    "qwen3_next",
    "olmoe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe",
    "gemma4",
    "minimax_m2",
    "hunyuan_v1_moe",
    "nemotron_h",
    "jamba",
]
# The others behind transformers' experts seam that have a causal language model.
OTHERS = [
    "afmoe",
    "aria_text",
    "cohere2_moe",
    "deepseek_v2",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe_lite",
    "granitemoehybrid",
    "granitemoeshared",
    "hy_v3",
    "lfm2_moe",
    "minimax",
    "solar_open",
]


class Reference:
    """A tiny checkpoint and transformers' logits for a prompt and the greedy tokens after it."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        self.packs = folder / "packs"
        save_tiny(model_type, self.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, 120, (1, 13), generator=generator)
        self.tokens: list[Tensor] = []
        self.logits = self._run(model)

    @torch.inference_mode()
    def _run(self, model: PreTrainedModel) -> list[Tensor]:
        given = list(self.tokens)
        out = model(input_ids=self.prompt, use_cache=True)
        logits = [out.logits]
        for step in range(DECODE_STEPS):
            token = given[step] if given else out.logits[:, -1:].argmax(-1)
            if not given:
                self.tokens.append(token)
            out = model(input_ids=token, cache=out.cache, use_cache=True)
            logits.append(out.logits)
        return logits

    def difference(self, slots: int | None, lookahead: bool) -> float:
        """The largest difference of our logits, over prefill and decode."""
        model, _ = offload.load(
            self.checkpoint,
            device="cpu",
            expert_bits=16,
            dense_bits=16,
            dtype=torch.float32,
            expert_slots=slots,
            lookahead=lookahead,
            pack_dir=self.packs,
        )
        handle = offload_of(model)
        try:
            ours = self._run(model)
            handle.engine.cache.check_integrity()
            counts = handle.stats().counts
            assert counts.requests > 0, "the experts were not ours"
            assert counts.hits + counts.misses == counts.requests
        finally:
            handle.close()
        pairs = zip(ours, self.logits, strict=True)
        return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


@pytest.mark.parametrize("model_type", NAMED)
def test_logits_are_transformers_own_at_every_cache_size(model_type: str, tmp_path: Path) -> None:
    reference = Reference(model_type, tmp_path)
    for slots in (1, K, EXPERTS * 3 // 2, None):
        for lookahead in (True, False):
            difference = reference.difference(slots, lookahead)
            assert difference < TOLERANCE, f"{slots} slots, look-ahead {lookahead}"


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_need_no_code_of_their_own(model_type: str, tmp_path: Path) -> None:
    reference = Reference(model_type, tmp_path)
    assert reference.difference(K, lookahead=True) < TOLERANCE


def test_look_ahead_guesses_with_the_next_router(tmp_path: Path) -> None:
    """Guesses are right far more often than chance, K of EXPERTS, would be."""
    save_tiny("mixtral", tmp_path / "checkpoint")
    model, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", expert_slots=6, pack_dir=tmp_path / "packs"
    )
    prompt = torch.randint(3, 120, (1, 13), generator=torch.Generator().manual_seed(1))
    model.generate(prompt, max_new_tokens=32, do_sample=False)
    counts = offload_of(model).stats().counts
    assert counts.lookahead_guesses >= 31 * 2 * K
    assert counts.lookahead_recall > 1.5 * K / EXPERTS
    offload_of(model).close()


def test_experts_stored_in_several_dtypes_are_not_rounded(tmp_path: Path) -> None:
    """The record takes the dtype that holds them all."""
    reference = Reference("mixtral", tmp_path)
    file = reference.checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".experts.3." in name:
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(reference.checkpoint, dtype=torch.float32)
    reference.tokens = []
    reference.logits = reference._run(model)
    assert reference.difference(K, lookahead=False) < TOLERANCE
