"""Several answers are made together, so that a step loads each expert once for all of them."""

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
from offload.generation.prompt import Message, Prompt, Request, check_request, end_tokens
from offload.generation.sampler import COLDEST, HOTTEST
from offload.generation.stream import stream_generate
from offload.generation.text import TextStream
from offload.sampling import PARAMETERS, Sampling, resolve_sampling

MOST_SEQUENCES = 1024  # answers to each prompt
FINAL = re.compile(r"(?:answer is|answer:|####)\s*(.+)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces three deep


class GenerationKeywords(TypedDict, total=False):
    """The keyword arguments of `generate`, which `stream_generate` documents."""

    max_new_tokens: int | None
    stop_strings: str | Sequence[str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


PromptBatch = list[str] | list[list[Message]] | list[list[int]]


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    num_return_sequences: Literal[1] = 1,
    **options: Unpack[GenerationKeywords],
) -> str: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    num_return_sequences: int,
    **options: Unpack[GenerationKeywords],
) -> list[str]: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptBatch,
    *,
    num_return_sequences: Literal[1] = 1,
    **options: Unpack[GenerationKeywords],
) -> list[str]: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptBatch,
    *,
    num_return_sequences: int,
    **options: Unpack[GenerationKeywords],
) -> list[list[str]]: ...


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt | PromptBatch,
    *,
    num_return_sequences: int = 1,
    **options: Unpack[GenerationKeywords],
) -> str | list[str] | list[list[str]]:
    """Return the whole answer to `prompt` as a text; `stream_generate` documents the options.

    A list of texts, of conversations or of id lists is answered as one batch: the result is a list
    of answers. With `num_return_sequences` above 1, the result holds a list of that many answers
    for each prompt. Raises `GenerationError`.
    """
    if tokenizer is None:
        raise GenerationError("the model has no tokenizer: use stream_generate for token ids")
    many = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    if not many and num_return_sequences == 1:
        steps = stream_generate(model, tokenizer, prompt, **options)  # type: ignore[arg-type]
        return "".join(step.text for step in steps)
    if unknown := sorted(options.keys() - GenerationKeywords.__annotations__.keys()):
        raise TypeError(f"generate has no {unknown[0]!r} for several answers")
    named = {name: value for name, value in options.items() if name in PARAMETERS}
    sampling = resolve_sampling(model.generation_config, **named)  # type: ignore[arg-type]
    made = complete(
        model,
        tokenizer,
        prompt if many else [prompt],  # type: ignore[arg-type, list-item]
        sampling,
        max_new_tokens=options.get("max_new_tokens"),
        stop_strings=options.get("stop_strings"),
        num_return_sequences=num_return_sequences,
    )
    texts = [[completion.text for completion in row] for row in made]
    if not many:
        return texts[0]
    return texts if num_return_sequences > 1 else [row[0] for row in texts]


@dataclass(frozen=True)
class Completion:
    """A finished answer to one prompt."""

    text: str
    prompt_tokens: int
    tokens: tuple[int, ...]  # the generated ones, including an end of sequence
    finish_reason: str  # "stop" or "length"


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_new_tokens: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    num_return_sequences: int = 1,
) -> list[list[Completion]]:
    """Make `num_return_sequences` answers to each prompt together, as one batch.

    The rounding of a row depends on the number of rows, so an answer may differ from the one that
    the prompt gets alone. When the row with the longest prompt reaches the end of the context, the
    others go on in a batch without it. Raises `GenerationError` before the first step.
    """
    if not 1 <= num_return_sequences <= MOST_SEQUENCES:
        raise GenerationError(
            f"num_return_sequences is {num_return_sequences}: it must be from 1 to {MOST_SEQUENCES}"
        )
    if sampling.temperature < COLDEST and num_return_sequences > 1:
        raise GenerationError("without sampling all answers are the same: give a temperature")
    ends = end_tokens(model, tokenizer)
    rows = [
        BatchRow(request, TextStream(tokenizer, request.stops), ends)
        for request in [
            check_request(model, tokenizer, prompt, max_new_tokens, stop_strings)
            for prompt in prompts
        ]
        for _ in range(num_return_sequences)
    ]
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices):
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        while unfinished := [row for row in rows if row.finish_reason is None]:
            _extend(model, unfinished, sampling, ends)
    made = [row.completion() for row in rows]
    return [
        made[begin : begin + num_return_sequences]
        for begin in range(0, len(made), num_return_sequences)
    ]


class BatchRow:
    """An answer that is being made, as one row of a batch."""

    def __init__(self, request: Request, stream: TextStream, ends: frozenset[int]) -> None:
        self.finish_reason: str | None = None
        self._request, self._stream, self._ends = request, stream, ends
        self._tokens: list[int] = []
        self._text = ""

    @property
    def ids(self) -> list[int]:
        """The ids of the prompt and of the answer so far."""
        return self._request.ids + self._tokens

    @property
    def left(self) -> int:
        """How many tokens may still be added."""
        return self._request.limit - len(self._tokens)

    def push(self, token: int) -> bool:
        """Add a token, unless the row is finished, and return whether the row is finished now."""
        if self.finish_reason is None:
            self._tokens.append(token)
            self._text += "" if token in self._ends else self._stream.push(token)
            if token in self._ends or self._stream.stopped:
                self.finish_reason = "stop"
            elif not self.left:
                self.finish_reason = "length"
        return self.finish_reason is not None

    def completion(self) -> Completion:
        """The answer, once the row is finished."""
        assert self.finish_reason is not None
        text = self._text + self._stream.finish()
        return Completion(text, len(self._request.ids), tuple(self._tokens), self.finish_reason)


class _Watch:  # acts as a StoppingCriteria, but does not inherit it because mypy sees that as Any
    """Passes each new token to its row, and reports which rows are finished."""

    def __init__(self, rows: Sequence[BatchRow]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        tokens = input_ids[:, -1].tolist()  # sync: the host searches the text for stop strings
        finished = [row.push(token) for row, token in zip(self._rows, tokens, strict=True)]
        return torch.tensor(finished, device=input_ids.device)


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the generation config of `model` from transformers' `generate`.

    It would add settings from there (beams, bad words) that `stream_generate` does not follow.
    """
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.inference_mode()
def _extend(
    model: PreTrainedModel, rows: Sequence[BatchRow], sampling: Sampling, ends: frozenset[int]
) -> None:
    """Extend every row until all are finished, or until the first reaches its limit of tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    pad = min((token for token in ends if token < vocabulary), default=0)  # masked: any id will do
    longest = max(len(row.ids) for row in rows)
    begins = [longest - len(row.ids) for row in rows]
    ids = [[pad] * begin + row.ids for begin, row in zip(begins, rows, strict=True)]
    mask = [[0] * begin + [1] * (longest - begin) for begin in begins]
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature >= COLDEST:
        choice = {
            "do_sample": True,
            "temperature": float(min(sampling.temperature, HOTTEST)),
            "top_k": sampling.top_k,
            "top_p": float(sampling.top_p),
            "min_p": float(sampling.min_p),
        }
    config = GenerationConfig(
        max_new_tokens=min(row.left for row in rows),
        repetition_penalty=float(sampling.repetition_penalty),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **choice,
    )
    with _without_generation_config(model):
        model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Watch(rows)]),
        )


def final_answer(text: str) -> str:
    r"""Extract what votes compare: the content of the last `\boxed{}` in `text`, otherwise what
    follows its last "answer is", otherwise its last line.

    The result is in lower case, without the spaces and punctuation around it.
    """
    if boxes := BOXED.findall(text):
        last = boxes[-1]
    elif finals := FINAL.findall(text):
        last = finals[-1]
    else:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return str(last).strip(" \t.,:;!*$`\"'").casefold()


def vote(texts: Sequence[str]) -> tuple[int, list[tuple[str, int]]]:
    """Return the index of the first text with the most frequent final answer, and the tally.

    The tally lists final answers with their counts, the most frequent first. This is
    self-consistency (Wang et al. 2022, arXiv 2203.11171).
    """
    keys = [final_answer(text) for text in texts]
    tally = Counter(keys).most_common()  # answers with equal counts stay in their first order
    return keys.index(tally[0][0]), tally
