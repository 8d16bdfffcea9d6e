"""Several answers are made together, so that a step loads each expert once for all of them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Integral
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.generation.conversation import Message
from offload.generation.inputs import Encoded, check_call, plain
from offload.generation.prompt import Prompt, check_request, end_tokens
from offload.generation.rope import longest_short
from offload.generation.sampler import COLDEST, Sampler
from offload.generation.stream import stream_generate
from offload.generation.text import Answer
from offload.sampling import Sampling, SamplingKeywords, is_number, resolve_sampling
from offload.units import SEES_PADDING

MOST_SEQUENCES = 1024  # answers to each prompt
FINAL = re.compile(r"(?:answer is|answer:|####)\s*(.+)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces three deep


class GenerationKeywords(SamplingKeywords, total=False):
    """The keyword arguments of `generate`, which `stream_generate` documents."""

    max_new_tokens: int | None
    stop_strings: str | Sequence[str] | None


PromptBatch = list[str] | tuple[str, ...] | list[list[Message]] | list[list[int]]


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


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Encoded,
    *,
    num_return_sequences: int = 1,
    **options: Unpack[GenerationKeywords],
) -> str | list[str] | list[list[str]]: ...


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt | PromptBatch | Encoded,
    *,
    num_return_sequences: int = 1,
    **options: Unpack[GenerationKeywords],
) -> str | list[str] | list[list[str]]:
    """Return the whole answer to `prompt` as a text; `stream_generate` documents the options.

    A list of texts, of conversations or of id lists is answered as one batch: the result is a list
    of answers. Ids may also be a tensor, an array, or what a tokenizer or `apply_chat_template`
    returns; with two dimensions each row is a prompt of a batch. With `num_return_sequences` above
    1, the result holds a list of that many answers for each prompt. Raises `GenerationError`.
    """
    known = {"num_return_sequences", *GenerationKeywords.__annotations__}
    check_call("generate", model, tokenizer, options, known)
    if tokenizer is None:
        raise GenerationError("the model has no tokenizer: use stream_generate for token ids")
    many, given = plain(prompt)
    if not many and num_return_sequences == 1:
        steps = stream_generate(model, tokenizer, given, **options)
        return "".join(step.text for step in steps)
    limit, stops = options.pop("max_new_tokens", None), options.pop("stop_strings", None)
    made = complete(
        model,
        tokenizer,
        given if many else [given],
        resolve_sampling(model.generation_config, **options),  # type: ignore[misc]  # without those two
        max_new_tokens=limit,
        stop_strings=stops,
        num_return_sequences=num_return_sequences,
    )
    texts = [[answer.text for answer in row] for row in made]
    if not many:
        return texts[0]
    return texts if num_return_sequences > 1 else [row[0] for row in texts]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_new_tokens: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    num_return_sequences: int = 1,
    skip_special_tokens: bool = True,
    watch: Callable[[Sequence[Answer]], None] | None = None,
) -> list[list[Answer]]:
    """Make `num_return_sequences` answers to each prompt together, as one batch.

    The rounding of a row depends on the number of rows, so an answer may differ from the one that
    the prompt gets alone. A model of `SEES_PADDING`, or with other rotary factors for long
    sequences, answers only prompts of equal length together. When the row with the longest prompt
    reaches the end of the context, the others go on in a batch without it. `watch` sees all answers
    after every step. Raises `GenerationError` before the first step.
    """
    count = num_return_sequences
    if not is_number(count, Integral) or not 1 <= count <= MOST_SEQUENCES:
        raise GenerationError(
            f"num_return_sequences is {count!r}: it must be a whole number from 1 to "
            f"{MOST_SEQUENCES}"
        )
    if sampling.temperature < COLDEST and count > 1:
        raise GenerationError("without sampling all answers are the same: give a temperature")
    ends = end_tokens(model, tokenizer)
    made = []
    for prompt in prompts:
        request = check_request(model, tokenizer, prompt, max_new_tokens, stop_strings)
        made.append([Answer(request, tokenizer, ends, skip_special_tokens) for _ in range(count)])
    answers = [answer for row in made for answer in row]
    sampler = Sampler(sampling, model.device)
    sees_padding = longest_short(model) is not None or (
        model.config.get_text_config().model_type in SEES_PADDING
    )
    with offload_of(model).threads or nullcontext():
        while unfinished := [answer for answer in answers if answer.finish_reason is None]:
            if sees_padding:
                length = len(unfinished[0].read)
                unfinished = [answer for answer in unfinished if len(answer.read) == length]
            _extend(model, unfinished, sampler, ends, partial(watch, answers) if watch else None)
    return made


@torch.inference_mode()
def _extend(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    sampler: Sampler,
    ends: frozenset[int],
    tell: Callable[[], None] | None,
) -> None:
    """Extend every answer until all are finished, or until the first reaches its limit."""
    threads = offload_of(model).threads
    vocabulary = model.config.get_text_config().vocab_size
    pad = min((token for token in ends if token < vocabulary), default=0)  # masked: any id will do
    read = [answer.read for answer in answers]
    longest = max(map(len, read))
    limit = min(answer.request.limit - len(answer.tokens) for answer in answers)
    if (switch := longest_short(model)) is not None and longest <= switch:
        limit = min(limit, switch - longest + 1)  # the next call reads longer sequences anew
    # A row is padded with a token that it has, so that a repetition penalty sees no other.
    ids = [row[:1] * (longest - len(row)) + row for row in read]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in read]

    def are_finished(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Pass each new token to its answer; this is a stopping criterion of transformers."""
        if threads is not None:
            threads.look()
        tokens = input_ids[:, -1].tolist()  # sync: the host searches the text for stop strings
        for answer, token in zip(answers, tokens, strict=True):
            if answer.finish_reason is None:
                answer.push(token)
        if tell is not None:
            tell()
        finished = [answer.finish_reason is not None for answer in answers]
        return torch.tensor(finished, device=input_ids.device)

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave only the tokens that the sampler draws; this is a logits processor."""
        token = sampler(input_ids, scores)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    config = GenerationConfig(
        max_new_tokens=limit, eos_token_id=sorted(ends) or None, pad_token_id=pad, do_sample=False
    )
    # transformers would add settings of the model's own config (beams, bad words), which
    # `stream_generate` does not follow. A view without them leaves the model to concurrent calls.
    view = object.__new__(type(model))
    view.__dict__ = {**model.__dict__, "generation_config": GenerationConfig()}
    view.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([choose]),
        stopping_criteria=StoppingCriteriaList([are_finished]),
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
