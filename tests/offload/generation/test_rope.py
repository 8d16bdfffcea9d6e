"""Factors of rotary embeddings that follow a sequence's length are those of one call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload.generation.prompt import PromptCache
from offload.quality.scoring import Sliding, Text, score
from tests.conftest import BEGIN, END, PAD, VOCABULARY, make_tokenizer
from tests.tiny import save_tiny

SWITCH = 24  # tokens; longer sequences have the long factors
PROMPT = [*range(20, 60)]


@pytest.fixture(scope="module", params=["phimoe", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 3 * i for i in range(8)],
        "original_max_position_embeddings": SWITCH,
        "factor": 4.0,
    }
    if request.param == "phimoe":
        rope |= {"short_mscale": 1.0, "long_mscale": 2.0}
    ids = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
    save_tiny(request.param, folder, vocab_size=VOCABULARY, rope_parameters=rope, **ids)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[offload.loading.Loaded]:
    with offload.load(
        checkpoint,
        device="cpu",
        dtype="float32",
        expert_bits=16,
        ubatch_size=7,
        pack_dir=tmp_path_factory.mktemp("packs"),
    ) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def in_one_call(reference: Any, ids: list[int]) -> torch.Tensor:
    """The logits [T, V] of transformers, which reads `ids` in one call."""
    with torch.no_grad():
        return reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    """The tokens that follow if every one of them is chosen from logits of one call."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(in_one_call(reference, ids + tokens)[-1].argmax()))
    return tokens


def tokens(loaded: Any, ids: list[int], count: int, **more: Any) -> list[int]:
    steps = offload.stream_generate(*loaded, ids, max_new_tokens=count, temperature=0, **more)
    return [step.token for step in steps]


@pytest.mark.parametrize("length", [SWITCH - 4, SWITCH, SWITCH + 1, len(PROMPT)])
def test_an_answer_is_that_of_calls_with_the_whole_sequence(
    loaded: Any, reference: Any, length: int
) -> None:
    ids = PROMPT[:length]
    right = greedy(reference, ids, 10)
    assert END not in right
    assert tokens(loaded, ids, 10) == right


def test_the_factors_differ_or_these_tests_show_nothing(reference: Any) -> None:
    short, long = in_one_call(reference, PROMPT[:SWITCH]), in_one_call(reference, PROMPT)
    assert (short[-1] - long[SWITCH - 1]).abs().max() > 0.01


def test_a_kept_cache_serves_only_sequences_of_the_same_factors(
    loaded: Any, reference: Any
) -> None:
    kept = PromptCache()
    for ids in (PROMPT[:10], PROMPT, PROMPT[:12], PROMPT[:14]):
        steps = list(
            offload.stream_generate(
                *loaded, ids, max_new_tokens=2, temperature=0, prompt_cache=kept
            )
        )
        assert [step.token for step in steps] == greedy(reference, ids, 2)
    assert steps[0].cached_tokens, "sequences on one side of the switch share their cache"


def test_rows_of_a_batch_are_as_each_alone(loaded: Any) -> None:
    prompts = [PROMPT[:5], PROMPT, PROMPT[:20], PROMPT[2:22]]
    right = [offload.generate(*loaded, ids, max_new_tokens=8, temperature=0) for ids in prompts]
    made = offload.generate(*loaded, prompts, max_new_tokens=8, temperature=0)
    assert made == right


def test_a_text_is_scored_as_in_one_call(loaded: Any, reference: Any) -> None:
    text = Text((), (*PROMPT, 1))
    rows = list(score(loaded.model, text, Sliding(64, 32), piece=7))
    found = torch.cat([each.log_probs for each in rows])
    right = in_one_call(reference, PROMPT).log_softmax(-1)
    assert (found - right).abs().max() < 1e-4
