"""Several answers at once: many prompts, or one prompt several times.

Knows: padding, transformers' `generate`, votes. Does not know: experts: a layer's step sees the
tokens of all rows, so each expert is loaded once for all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from offload.errors import GenerationError
from offload.generation.stream import Message, Prompt, Request, end_tokens, prepare, stream_generate
from offload.generation.text import TextStream
from offload.sampling import COLDEST, HOTTEST, PARAMETERS, Sampling, resolve_sampling

MOST_SEQUENCES = 1024  # answers a prompt
FINAL = re.compile(r"(?:answer is|answer:|####)\s*(.+)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces three deep


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
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"generate has no {unknown[0]!r} for several answers")
    named = {name: value for name, value in options.items() if name in PARAMETERS}
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
    the prompt gets alone. Where the longest prompt leaves little of the context, the others are
    answered that far together with it and then go on without it. Raises `GenerationError` before
    the first step.
    """
    if not 1 <= num_return_sequences <= MOST_SEQUENCES:
        raise GenerationError(
            f"num_return_sequences is {num_return_sequences}: it must be from 1 to {MOST_SEQUENCES}"
        )
    if sampling.temperature < COLDEST and num_return_sequences > 1:
        raise GenerationError("without sampling all answers are the same: give a temperature")
    ends = end_tokens(model, tokenizer)
    rows = [
        Row(request, TextStream(tokenizer, request.stops), ends)
        for request in [prepare(model, tokenizer, p, max_new_tokens, stop_strings) for p in prompts]
        for _ in range(num_return_sequences)
    ]
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices):
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        while going_on := [row for row in rows if row.finish_reason is None]:
            _go_on(model, going_on, sampling, ends)
    made = [row.answer() for row in rows]
    return [
        made[begin : begin + num_return_sequences]
        for begin in range(0, len(made), num_return_sequences)
    ]


class Row:
    """An answer that is being made."""

    def __init__(self, request: Request, stream: TextStream, ends: frozenset[int]) -> None:
        self.finish_reason: str | None = None
        self._request, self._stream, self._ends = request, stream, ends
        self._tokens: list[int] = []
        self._text = ""

    @property
    def ids(self) -> list[int]:
        """The prompt, and what was said so far."""
        return self._request.ids + self._tokens

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self._request.limit - len(self._tokens)

    def push(self, token: int) -> bool:
        """One more token; whether it was the last. None is taken after that."""
        if self.finish_reason is None:
            self._tokens.append(token)
            self._text += "" if token in self._ends else self._stream.push(token)
            if token in self._ends or self._stream.stopped:
                self.finish_reason = "stop"
            elif not self.left:
                self.finish_reason = "length"
        return self.finish_reason is not None

    def answer(self) -> Answer:
        """What was said in the end."""
        assert self.finish_reason is not None
        text = self._text + self._stream.finish()
        return Answer(text, len(self._request.ids), tuple(self._tokens), self.finish_reason)


class _Watch:  # a StoppingCriteria by what it does: to mypy that class is Any
    """Gives each row its tokens, and says which rows are over."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        tokens = input_ids[:, -1].tolist()  # sync: stop strings are looked for on the host
        over = [row.push(token) for row, token in zip(self._rows, tokens, strict=True)]
        return torch.tensor(over, device=input_ids.device)


@contextmanager
def _only(model: PreTrainedModel) -> Iterator[None]:
    """`model` without a generation config: transformers adds to what it is given whatever that says
    beside it (beams, bad words), which no answer that is made alone knows of."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.inference_mode()
def _go_on(
    model: PreTrainedModel, rows: Sequence[Row], sampling: Sampling, ends: frozenset[int]
) -> None:
    """Say more in each row, as far as the context holds the longest one."""
    vocabulary = model.config.get_text_config().vocab_size
    pad = min((token for token in ends if token < vocabulary), default=0)  # never attended to
    longest = max(len(row.ids) for row in rows)
    begins = [longest - len(row.ids) for row in rows]
    ids = [[pad] * begin + row.ids for begin, row in zip(begins, rows, strict=True)]
    mask = [[0] * begin + [1] * (longest - begin) for begin in begins]
    greedy = sampling.temperature < COLDEST
    config = GenerationConfig(
        max_new_tokens=min(row.left for row in rows),
        do_sample=not greedy,
        repetition_penalty=float(sampling.repetition_penalty),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **({} if greedy else _warpers(sampling)),
    )
    with _only(model):
        model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Watch(rows)]),
        )


def _warpers(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": float(min(sampling.temperature, HOTTEST)),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p),
    }


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
