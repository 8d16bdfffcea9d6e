"""A batch gives the same answers as each prompt alone, and loads each expert once; votes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import offload
from offload.generation.batch import complete, final_answer, vote
from offload.sampling import Sampling
from tests.conftest import save_with_tokenizer

CONTEXT = 256
PROMPTS = ["a", "a longer one", "שלום", "the longest of all of these prompts"]


@pytest.fixture(scope="module")
def loaded(
    mixtral: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
    model, tokenizer = offload.load(
        mixtral,
        device="cpu",
        dtype=torch.float32,
        expert_slots=4,
        context=CONTEXT,
        pack_dir=tmp_path_factory.mktemp("packs"),
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    yield model, tokenizer
    model.offload.close()


def test_a_batch_answers_as_each_prompt_alone(loaded: tuple[Any, Any]) -> None:
    alone = [offload.generate(*loaded, prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert offload.generate(*loaded, PROMPTS, max_new_tokens=12) == alone


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next", "qwen3_moe"])
def test_windows_and_linear_attention_do_not_see_padding(model_type: str, tmp_path: Path) -> None:
    model, tokenizer = offload.load(
        save_with_tokenizer(model_type, tmp_path / "checkpoint"),
        device="cpu",
        dtype=torch.float32,
        expert_slots=4,
        pack_dir=tmp_path / "packs",
    )
    prompts = [[7, 8, 9], [*range(5, 45)], [11] * 20]
    alone = [offload.generate(model, tokenizer, prompt, max_new_tokens=8) for prompt in prompts]
    assert offload.generate(model, tokenizer, prompts, max_new_tokens=8) == alone
    model.offload.close()


def test_a_prompt_that_fills_the_context_does_not_shorten_the_others(
    loaded: tuple[Any, Any],
) -> None:
    prompts = [[5, 6, 7], [9] * (CONTEXT - 3), [8] * 20]
    model, tokenizer = loaded
    rows = complete(model, tokenizer, prompts, Sampling(), max_new_tokens=30)
    assert [len(row.tokens) for (row,) in rows] == [30, 3, 30]
    for prompt, (row,) in zip(prompts, rows, strict=True):
        assert row.text == offload.generate(model, tokenizer, prompt, max_new_tokens=30)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_batch_follows_the_given_options_and_no_others(
    penalty: float, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loaded[0], "generation_config", GenerationConfig(no_repeat_ngram_size=1, eos_token_id=999)
    )
    options: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": penalty}
    alone = [offload.generate(*loaded, prompt, **options) for prompt in PROMPTS]
    assert offload.generate(*loaded, PROMPTS, **options) == alone
    assert loaded[0].generation_config.no_repeat_ngram_size == 1


def test_an_unknown_option_of_a_batch_is_an_error(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="num_beams"):
        offload.generate(*loaded, PROMPTS, num_beams=2)


def test_conversations_and_ids_can_be_batches(loaded: tuple[Any, Any]) -> None:
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:2]]
    alone = [offload.generate(*loaded, chat, max_new_tokens=5) for chat in chats]
    assert offload.generate(*loaded, chats, max_new_tokens=5) == alone
    ids = [[5, 6, 7], [8, 9]]
    alone = [offload.generate(*loaded, row, max_new_tokens=5) for row in ids]
    assert offload.generate(*loaded, ids, max_new_tokens=5) == alone


def test_an_expert_is_loaded_once_for_all_rows(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    before = model.offload.stats()
    offload.generate(*loaded, ["same"] * 6, max_new_tokens=8)
    together = (model.offload.stats() - before).counts
    before = model.offload.stats()
    offload.generate(*loaded, ["same"], max_new_tokens=8)
    alone = (model.offload.stats() - before).counts
    assert together.requests == alone.requests


def test_several_answers_to_one_prompt_follow_the_seed(loaded: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    made = offload.generate(*loaded, "a", num_return_sequences=3, **options)
    assert len(made) == 3
    assert len(set(made)) > 1
    assert offload.generate(*loaded, "a", num_return_sequences=3, **options) == made
    both = offload.generate(*loaded, PROMPTS[:2], num_return_sequences=2, **options)
    assert [len(row) for row in both] == [2, 2]


def test_a_seed_does_not_change_torchs_own_random_state(loaded: tuple[Any, Any]) -> None:
    state = torch.random.get_rng_state()
    offload.generate(*loaded, PROMPTS, max_new_tokens=2, temperature=1.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_stop_string_ends_a_row(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ((whole,),) = complete(model, tokenizer, ["a"], Sampling(), max_new_tokens=20)
    stop = whole.text[3:5]
    ((cut,),) = complete(model, tokenizer, ["a"], Sampling(), max_new_tokens=20, stop_strings=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")
    assert len(cut.tokens) < len(whole.tokens) == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_return_sequences": 2}, "temperature"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_options_that_cannot_be_answered_are_refused(
    options: dict[str, Any], words: str, loaded: tuple[Any, Any]
) -> None:
    with pytest.raises(offload.GenerationError, match=words):
        offload.generate(*loaded, PROMPTS, **options)


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("so\nthe answer is 12.", "12"),
        ("Answer: **Paris**\n", "paris"),
        (r"thus \boxed{x^2} holds, the answer is 3", "x^2"),
        (r"\boxed{\frac{1}{2}} and \boxed{\sqrt{\frac{1}{3}}}.", r"\sqrt{\frac{1}{3}}"),
        ("#### 7", "7"),
        ("one\ntwo \n\n", "two"),
        ("", ""),
    ],
)
def test_the_final_answer_is_extracted_from_a_text(text: str, final: str) -> None:
    assert final_answer(text) == final


def test_the_first_text_with_the_most_frequent_answer_wins() -> None:
    winner, tally = vote(["Answer: 1", "it is\n2", "the answer is 2.", "3"])
    assert winner == 1
    assert tally == [("2", 2), ("1", 1), ("3", 1)]
