"""A prompt means the same in every form that users of transformers write it in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import offload
from offload.errors import GenerationError
from offload.generation.inputs import plain

IDS = [72, 105, 33]  # "Hi!"
MESSAGES = [{"role": "user", "content": "Hi!"}]
ONE = {
    "tuple": (72, 105, 33),
    "tensor": torch.tensor(IDS),
    "array": np.array(IDS),
    "numbers of NumPy": list(np.array(IDS)),
    "range": range(72, 75),
    "encoding": BatchEncoding({"input_ids": IDS, "attention_mask": [1, 1, 1]}),
    "padded encoding": {"input_ids": [0, *IDS], "attention_mask": [0, 1, 1, 1]},
}
SEVERAL = {
    "lists": [[7], IDS],
    "tensors": [torch.tensor([7]), torch.tensor(IDS)],
    "arrays": (np.array([7]), np.array(IDS)),
    "encodings": [{"input_ids": [7]}, {"input_ids": IDS}],
    "padded tensors": {
        "input_ids": torch.tensor([[0, 0, 7], IDS]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
    },
    "padded on the right": BatchEncoding(
        {"input_ids": [[7, 0, 0], IDS], "attention_mask": [[1, 0, 0], [1, 1, 1]]}
    ),
}


@pytest.fixture(scope="module")
def loaded(
    mixtral: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[offload.loading.Loaded]:
    packs = tmp_path_factory.mktemp("packs")
    with offload.load(mixtral, device="cpu", dtype="float32", pack_dir=packs) as loaded:
        yield loaded


@pytest.mark.parametrize("form", ONE)
def test_ids_in_every_form_are_one_prompt(form: str) -> None:
    assert plain(ONE[form]) == (False, [72, 73, 74] if form == "range" else IDS)


@pytest.mark.parametrize("form", SEVERAL)
def test_rows_of_ids_in_every_form_are_a_batch(form: str) -> None:
    assert plain(SEVERAL[form]) == (True, [[7], IDS])


def test_texts_in_a_tuple_are_a_batch_and_messages_in_one_a_conversation() -> None:
    assert plain(("a", "b")) == (True, ["a", "b"])
    assert plain(tuple(MESSAGES)) == (False, MESSAGES)
    assert plain([MESSAGES, MESSAGES]) == (True, [MESSAGES, MESSAGES])


def test_what_tokenizers_return_is_answered_as_their_text(loaded: Any) -> None:
    tokenizer = loaded.tokenizer
    answer = offload.generate(*loaded, "Hi!", max_new_tokens=4)
    for given in (tokenizer("Hi!"), torch.tensor(IDS), np.array(IDS)):
        assert offload.generate(*loaded, given, max_new_tokens=4) == answer
    assert offload.generate(*loaded, ("Hi!", "Ho"), max_new_tokens=4)[0] == answer
    one_row = tokenizer("Hi!", return_tensors="pt")
    assert offload.generate(*loaded, one_row, max_new_tokens=4) == [answer]
    steps = offload.stream_generate(*loaded, one_row, max_new_tokens=4)
    assert "".join(step.text for step in steps) == answer
    templated = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    chat = offload.generate(*loaded, MESSAGES, max_new_tokens=4)
    assert offload.generate(*loaded, templated, max_new_tokens=4) == chat
    padded = tokenizer(["Hi!", "a longer one"], padding=True, return_tensors="pt")
    alone = [offload.generate(*loaded, text, max_new_tokens=4) for text in ("Hi!", "a longer one")]
    assert offload.generate(*loaded, padded, max_new_tokens=4) == alone


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (42, "the prompt is 42: give a text, a list of messages, or token ids"),
        (None, "the prompt is None: give"),
        (torch.tensor(7), "the prompt is 7: give"),
        (b"Hi!", "the prompt is bytes: decode it to a text"),
        (MESSAGES[0], "the prompt is one message: put it into a list"),
        ({"text": "Hi!"}, "the prompt is a dict without input_ids"),
        ([{"content": "Hi!"}], "a message has no 'role'"),
        ([{"role": "user"}], "a message has no 'content'"),
        ([{"role": "user", "content": 3}], "the content of a message is 3: give a text"),
        (["Hi!", 7], "the prompt mixes texts and token ids"),
        ([1.5], "the prompt has 1.5 in it"),
        ([True], "the prompt has True in it"),
        ([None], "the prompt has None in it"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_no_prompt_gets_one_sentence(prompt: Any, told: str, loaded: Any) -> None:
    for function in (offload.generate, offload.stream_generate):
        with pytest.raises(GenerationError, match=told):
            function(*loaded, prompt)


def test_a_stream_answers_one_prompt(loaded: Any) -> None:
    with pytest.raises(GenerationError, match="a batch of 2 prompts: give it to generate"):
        offload.stream_generate(*loaded, ["a", "b"])  # type: ignore[arg-type]
