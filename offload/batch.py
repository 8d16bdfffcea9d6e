"""Several answers at once: many prompts, or one prompt several times.

Knows: padding, transformers' `generate`, votes. Does not know: experts: a layer's step sees the
tokens of all rows, so each expert is loaded once for all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from offload.errors import GenerationError
from offload.generation import Message, Prompt, Request, end_tokens, prepare, stream_generate
from offload.sampling import COLDEST, Sampling, resolve_sampling
from offload.text import TextStream

MOST_SEQUENCES = 1024  # answers a prompt
FINAL = re.compile(r"(?:answer is|answer:|####)\s*(.+)", re.IGNORECASE)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class GenerateOptions(TypedDict, total=False):
    """What `generate` takes by name, as `stream_generate` documents it."""

    max_new_tokens: int | None
    stop_strings: str | Sequence[str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


Prompts = list[str] | list[list[Message]] | list[list[int]]


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    num_return_sequences: Literal[1] = 1,
    **options: Unpack[GenerateOptions],
) -> str: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    num_return_sequences: int,
    **options: Unpack[GenerateOptions],
) -> list[str]: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompts,
    *,
    num_return_sequences: Literal[1] = 1,
    **options: Unpack[GenerateOptions],
) -> list[str]: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompts,
    *,
    num_return_sequences: int,
    **options: Unpack[GenerateOptions],
) -> list[list[str]]: ...


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt | Prompts,
    *,
    num_return_sequences: int = 1,
    **options: Unpack[GenerateOptions],
) -> str | list[str] | list[list[str]]:
    """The whole text that `stream_generate` makes of a prompt, which documents the options.

    A list of texts, of conversations or of lists of ids is answered as one batch, with a list.
    With `num_return_sequences` above 1 each prompt has a list of so many answers. Raises
    `GenerationError`.
    """
    if tokenizer is None:
        raise GenerationError("the model has no tokenizer: use stream_generate for token ids")
    many = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    if not many and num_return_sequences == 1:
        steps = stream_generate(model, tokenizer, prompt, **options)  # type: ignore[arg-type]
        return "".join(step.text for step in steps)
    named = {name: value for name, value in options.items() if name in SAMPLING}
    sampling = resolve_sampling(model.generation_config, **named)  # type: ignore[arg-type]
    made = answers(
        model,
        tokenizer,
        prompt if many else [prompt],  # type: ignore[arg-type, list-item]
        sampling,
        max_new_tokens=options.get("max_new_tokens"),
        stop_strings=options.get("stop_strings"),
        num_return_sequences=num_return_sequences,
    )
    texts = [[answer.text for answer in row] for row in made]
    if not many:
        return texts[0]
    return texts if num_return_sequences > 1 else [row[0] for row in texts]


@dataclass(frozen=True)
class Answer:
    """What was said to one prompt."""

    text: str
    prompt_tokens: int
    tokens: tuple[int, ...]  # generated, an end of sequence included
    finish_reason: str  # "stop" or "length"


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_new_tokens: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    num_return_sequences: int = 1,
) -> list[list[Answer]]:
    """`num_return_sequences` answers to each prompt, made together.

    A row's rounding depends on how many rows there are, so an answer may differ from the one that
    the prompt gets alone. Raises `GenerationError` before the first step.
    """
    if not 1 <= num_return_sequences <= MOST_SEQUENCES:
        raise GenerationError(
            f"num_return_sequences is {num_return_sequences}: it must be from 1 to {MOST_SEQUENCES}"
        )
    greedy = sampling.temperature < COLDEST
    if greedy and num_return_sequences > 1:
        raise GenerationError("without sampling all answers are the same: give a temperature")
    rows = [prepare(model, tokenizer, prompt, max_new_tokens, stop_strings) for prompt in prompts]
    if not rows:
        return []
    longest = max(len(row.ids) for row in rows)
    ends = end_tokens(model, tokenizer)
    pad = next(iter(sorted(ends)), 0)  # never attended to
    ids = torch.tensor([[pad] * (longest - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows])
    limit = min(row.limit for row in rows)
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=not greedy,
        repetition_penalty=float(sampling.repetition_penalty),
        num_return_sequences=num_return_sequences,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **({} if greedy else _warpers(sampling)),
    )
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices):
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            **({"stop_strings": rows[0].stops, "tokenizer": tokenizer} if rows[0].stops else {}),
        )
    made = [
        _answer(tokenizer, rows[at // num_return_sequences], tokens, ends)
        for at, tokens in enumerate(out[:, longest:].tolist())
    ]
    return [
        made[begin : begin + num_return_sequences]
        for begin in range(0, len(made), num_return_sequences)
    ]


def _warpers(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": float(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p) or None,
    }


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    row: Request,
    tokens: list[int],
    ends: frozenset[int],
) -> Answer:
    text, stream = "", TextStream(tokenizer, row.stops)
    for count, token in enumerate(tokens, start=1):
        text += "" if token in ends else stream.push(token)
        if token in ends or stream.stopped:
            return Answer(text + stream.finish(), len(row.ids), tuple(tokens[:count]), "stop")
    return Answer(text + stream.finish(), len(row.ids), tuple(tokens), "length")


def final_answer(text: str) -> str:
    """What an answer comes down to: what is in its last box, else what follows its last "answer
    is", else its last line; without case, spaces and marks around it."""
    if boxes := BOXED.findall(text):
        last = boxes[-1]
    elif finals := FINAL.findall(text):
        last = finals[-1]
    else:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return str(last).strip(" \t.,:;!*$`\"'").casefold()


def vote(texts: Sequence[str]) -> tuple[int, list[tuple[str, int]]]:
    """The place of the first text whose final answer most texts give, and the tally, most first.

    Self-consistency (Wang et al. 2022, arXiv 2203.11171).
    """
    keys = [final_answer(text) for text in texts]
    tally = Counter(keys).most_common()  # equals in the order in which they came
    return keys.index(tally[0][0]), tally
