"""Several answers are made together, so that a step loads each expert once for all of them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from offload.errors import GenerationError
from offload.generation.prompt import Message, Prompt, check_request, end_tokens
from offload.generation.sampler import COLDEST, HOTTEST
from offload.generation.stream import stream_generate
from offload.generation.text import Answer
from offload.sampling import Sampling, SamplingKeywords, resolve_sampling

MOST_SEQUENCES = 1024  # answers to each prompt
FINAL = re.compile(r"(?:answer is|answer:|####)\s*(.+)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces three deep


class GenerationKeywords(SamplingKeywords, total=False):
    """The keyword arguments of `generate`, which `stream_generate` documents."""

    max_new_tokens: int | None
    stop_strings: str | Sequence[str] | None


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
    limit, stops = options.pop("max_new_tokens", None), options.pop("stop_strings", None)
    made = complete(
        model,
        tokenizer,
        prompt if many else [prompt],  # type: ignore[arg-type, list-item]
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
) -> list[list[Answer]]:
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
    made = []
    for prompt in prompts:
        request = check_request(model, tokenizer, prompt, max_new_tokens, stop_strings)
        made.append([Answer(request, tokenizer, ends) for _ in range(num_return_sequences)])
    answers = [answer for row in made for answer in row]
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices):
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        while unfinished := [answer for answer in answers if answer.finish_reason is None]:
            _extend(model, unfinished, sampling, ends)
    return made


@torch.inference_mode()
def _extend(
    model: PreTrainedModel, answers: Sequence[Answer], sampling: Sampling, ends: frozenset[int]
) -> None:
    """Extend every answer until all are finished, or until the first reaches its limit."""
    vocabulary = model.config.get_text_config().vocab_size
    pad = min((token for token in ends if token < vocabulary), default=0)  # masked: any id will do
    read = [answer.request.ids + answer.tokens for answer in answers]
    longest = max(map(len, read))
    ids = [[pad] * (longest - len(row)) + row for row in read]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in read]

    def are_finished(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Pass each new token to its answer; this is a stopping criterion of transformers."""
        tokens = input_ids[:, -1].tolist()  # sync: the host searches the text for stop strings
        for answer, token in zip(answers, tokens, strict=True):
            if answer.finish_reason is None:
                answer.push(token)
        finished = [answer.finish_reason is not None for answer in answers]
        return torch.tensor(finished, device=input_ids.device)

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
        max_new_tokens=min(answer.request.limit - len(answer.tokens) for answer in answers),
        repetition_penalty=float(sampling.repetition_penalty),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **choice,
    )
    # transformers would add settings of the model's own config (beams, bad words), which
    # `stream_generate` does not follow.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([are_finished]),
        )
    finally:
        model.generation_config = kept


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
