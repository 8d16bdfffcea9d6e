"""The scores that eager attention keeps: whose, how many bytes, and how long a chunk may be."""

from __future__ import annotations

import logging
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedConfig

import offload
from offload.budget.budget import ALIVE, Memory, chunk_tokens, keeps_scores, score_bytes
from offload.budget.resolve import Place, Resolver
from offload.options import LoadOptions
from offload.quant.pack import Pack
from tests.tiny import tiny_config

GIB = 2**30
GPT_OSS = GptOssConfig(num_attention_heads=64)
BF16 = torch.bfloat16


def _eager(config: PreTrainedConfig) -> PreTrainedConfig:
    config._attn_implementation = "eager"
    return config


def test_models_without_fused_attention_keep_scores() -> None:
    assert keeps_scores(tiny_config("gpt_oss"))
    assert not keeps_scores(tiny_config("mixtral"))
    assert keeps_scores(_eager(tiny_config("mixtral")))
    assert not keeps_scores(PreTrainedConfig()), "nobody knows"


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "gemma4"])
def test_what_transformers_chooses_is_what_is_said(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    chosen = model.config.get_text_config()._attn_implementation == "eager"
    assert keeps_scores(tiny_config(model_type)) == chosen


def test_scores_are_heads_by_tokens_by_context_several_times() -> None:
    assert ALIVE == 4
    assert 2048 * score_bytes(GPT_OSS, 4096, 2) == 4 * GIB
    assert 2048 * score_bytes(GPT_OSS, 32768, 2) == 32 * GIB
    assert score_bytes(tiny_config("mixtral"), 4096, 2) == 0


@pytest.mark.parametrize(
    ("context", "gib", "tokens"),
    [
        (4096, 32, 2048),
        (4096, 24, 1024),
        (4096, 8, 512),
        (32768, 24, 128),
        (32768, 8, 64),
        (131072, 8, 16),
    ],
)
def test_a_chunk_is_as_long_as_its_scores_fit_an_eighth_of_the_memory(
    context: int, gib: int, tokens: int
) -> None:
    assert chunk_tokens(GPT_OSS, 2048, context, gib * GIB, BF16) == tokens
    assert chunk_tokens(GPT_OSS, 8, context, gib * GIB, BF16) == 8
    assert chunk_tokens(tiny_config("mixtral"), 2048, context, gib * GIB, BF16) == 2048


@pytest.mark.parametrize(
    ("asked", "level"), [(2048, logging.INFO), (1500, logging.WARNING), (8, None)]
)
def test_who_asked_for_a_longer_chunk_is_told(
    asked: int, level: int | None, gpt_oss: Path, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    with caplog.at_level(logging.INFO, "offload"):
        model, _ = offload.load(
            gpt_oss, device="cpu", ram="4GiB", context=400_000, ubatch_size=asked
        )
    model.offload.close()
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    assert all(f"not {asked}" in record.getMessage() for record in caplog.records)


def test_a_chunk_has_a_token_however_little_memory_there_is() -> None:
    assert chunk_tokens(GPT_OSS, 2048, 4096, 0, BF16) == 1


def test_scores_are_in_the_budget_and_the_options_have_the_shorter_chunk(
    mixtral_pack: Any,
) -> None:
    pack = Pack(mixtral_pack)
    config = tiny_config("mixtral", max_position_embeddings=100_000)
    scored, cpu = _eager(deepcopy(config)), torch.device("cpu")
    asked = LoadOptions(dtype=BF16, context=100_000)
    resolver = Resolver(asked, Place(cpu, Memory(2 * GIB, 2 * GIB)))
    fused, eager = (resolver.budget(pack.info, each) for each in (config, scored))
    a_token = score_bytes(scored, 100_000, 2)
    tokens = resolver.fit(pack.info, scored).ubatch
    assert 0 < tokens < resolver.fit(pack.info, config).ubatch == 2048
    assert tokens * a_token <= 2 * GIB // 8 < 2 * tokens * a_token
    cells = 2 * 2 * config.hidden_size * 4  # a token's, as for any model
    assert eager.workspace == fused.workspace - (2048 - tokens) * cells + tokens * a_token
    pack.close()


class Living(TorchDispatchMode):
    """The most bytes that large tensors held at once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                self.tensors.append(weakref.ref(tensor))
        here = [tensor for ref in self.tensors if (tensor := ref()) is not None]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in here}
        self.most = max(self.most, sum(held.values()))
        return out


@pytest.mark.parametrize(("model_type", "alive"), [("gpt_oss", 3), ("mixtral", 4)])
def test_no_more_tensors_of_that_size_live_at_once_than_are_counted(
    model_type: str, alive: int
) -> None:
    tokens = 160
    config = _eager(tiny_config(model_type))
    model = AutoModelForCausalLM.from_config(config, dtype=BF16).eval()
    scores = config.num_attention_heads * tokens * tokens * 2
    ids = torch.arange(tokens)[None] % 100
    with Living(scores) as living, torch.inference_mode():
        model(input_ids=ids, logits_to_keep=1)
    assert (alive - 0.5) * scores < living.most <= ALIVE * scores * 1.01
