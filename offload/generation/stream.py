"""Generating text: ids in, text with its timings out.

Knows: prefill, decode, when to stop. Does not know: experts; the model looks like any transformers
model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import Answer, offload_of
from offload.engine.stats import Stats
from offload.errors import GenerationError
from offload.generation import recovery
from offload.generation.patience import OutOfPatience, patiently
from offload.generation.prompt_cache import PromptCache
from offload.generation.sampler import Sampler
from offload.generation.text import TextStream
from offload.lines import is_memory, reason
from offload.model.sources import end_ids
from offload.sampling import Sampling, is_number, resolve_sampling
from offload.units import READ_WHOLE, UBATCH

Message = dict[str, str]  # role, content
Prompt = str | Sequence[Message] | Sequence[int]
DEFAULT_NEW_TOKENS = 256
TEMPLATE_SECONDS, TEMPLATE_BYTES = 20.0, 2**30  # what a chat template may take


@dataclass(frozen=True)
class GenerationResponse:
    """One step of `stream_generate`; the last one has a `finish_reason` and the final figures."""

    text: str  # new since the step before
    token: int
    prompt_tokens: int
    cached_tokens: int  # of them, in the KV cache from the prompt before
    prompt_seconds: float  # of the prefill, with the choice of the first token
    prompt_tps: float  # tokens/s of the prefill, those in the cache not counted
    generation_tokens: int
    generation_seconds: float  # of the decode, so far
    generation_tps: float  # tokens/s of the decode, the prefill's token not counted
    peak_memory: int  # bytes: of the process, or of the GPU's allocations
    finish_reason: str | None  # "stop" (end of sequence or stop string), "length", or None
    experts: Stats  # of this generation


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, *, think: bool | None = None
) -> list[int]:
    """Token ids of a text as it stands, of messages through the chat template, or of ids.

    `think`: what the template is told as `enable_thinking`; None: nothing.

    Raises `GenerationError` when that is not possible.
    """
    if isinstance(prompt, str):
        check_text(prompt)
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        ids = [int(item) for item in prompt]  # type: ignore[arg-type]
    elif tokenizer is None:
        raise GenerationError("the model has no tokenizer: give token ids instead of text")
    elif isinstance(prompt, str):
        ids = _tokens(tokenizer, prompt)
    elif not tokenizer.chat_template:
        raise GenerationError("the model has no chat template: give the prompt as a text")
    else:
        thinking = {} if think is None else {"enable_thinking": think}

        def render() -> Any:
            return tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True, **thinking
            )

        try:
            text = patiently(render, seconds=TEMPLATE_SECONDS, most_bytes=TEMPLATE_BYTES)
        except OutOfPatience:
            raise GenerationError(
                f"the chat template took more than {TEMPLATE_SECONDS:.0f} s or "
                f"{TEMPLATE_BYTES >> 20} MiB: it is broken or hostile, use offload generate --raw"
            ) from None
        except Exception as error:  # a template is a program of the checkpoint's
            if is_memory(error):
                raise
            raise GenerationError(f"the chat template refused the messages: {error}") from None
        check_text(text)
        ids = _tokens(tokenizer, text, add_special_tokens=False)
    if not ids:
        raise GenerationError("the prompt is empty")
    return ids


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # whatever comes of what its files say
        if is_memory(error):
            raise
        raise GenerationError(
            f"the tokenizer cannot read the prompt ({type(error).__name__}: {reason(error)}): "
            "its files are damaged, fetch them again"
        ) from None


def check_text(text: str) -> None:
    """Raise `GenerationError` for what no tokenizer takes: bytes that a terminal or a command line
    gave and that are no UTF-8, which Python keeps as surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start]
        raise GenerationError(
            f"the prompt is not UTF-8 text (after {near!r}): correct it and send it again"
        ) from None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Ids that end a sequence: generation_config's, else the tokenizer's."""
    config = model.generation_config
    ids = config.eos_token_id if config is not None else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    return end_ids(ids)


def stream_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    skip_special_tokens: bool = True,
    prompt_cache: PromptCache | None = None,
) -> Iterator[GenerationResponse]:
    """Generate from `prompt`: a text as it stands, a list of `{"role", "content"}` messages, or
    ids.

    What is not given comes from the checkpoint's `generation_config`; greedy if that does not
    sample. `max_new_tokens` None: the config's, else 256. Stop strings are not part of the text.
    With a `prompt_cache` only what differs from the prompt and answer before is read again.
    Raises `GenerationError` before the first step.
    """
    sampling = resolve_sampling(
        model.generation_config,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    request = prepare(model, tokenizer, prompt, max_new_tokens, stop_strings)
    text = None
    if tokenizer is not None:
        text = TextStream(tokenizer, request.stops, skip_special_tokens)
    ends = end_tokens(model, tokenizer)
    return _stream(model, request, sampling, ends, text, prompt_cache)


@dataclass(frozen=True)
class Request:
    """A prompt that can be answered."""

    ids: list[int]
    limit: int  # of new tokens
    stops: list[str]


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    max_new_tokens: int | None,
    stop_strings: str | Sequence[str] | None,
) -> Request:
    """Check what was asked, as `stream_generate` documents it. Raises `GenerationError`."""
    limit = max_new_tokens
    if limit is None:
        limit = getattr(model.generation_config, "max_new_tokens", None) or DEFAULT_NEW_TOKENS
    if not is_number(limit, Integral) or limit < 1:
        raise GenerationError(f"max_new_tokens is {limit!r}: it must be at least 1")
    if offload_of(model).engine.closed:
        raise GenerationError("the model was closed: load it again")
    ids = encode_prompt(tokenizer, prompt)
    vocabulary = model.config.get_text_config().vocab_size
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise GenerationError(f"the prompt has a token outside the model's {vocabulary}")
    context = check_length(model, ids)
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
    if stops and tokenizer is None:
        raise GenerationError("stop strings need a tokenizer, and the model has none")
    return Request(ids, min(limit, context - len(ids)), [stop for stop in stops if stop])


def check_length(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """Tokens that the context holds; raises `GenerationError` where `ids` leave no room for an
    answer."""
    context = offload_of(model).options.context
    if len(ids) >= context:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens and the context holds {context}: shorten it or "
            "raise --ctx-size (context=)"
        )
    return context


def _stream(
    model: PreTrainedModel,
    request: Request,
    sampling: Sampling,
    ends: frozenset[int],
    text: TextStream | None,
    kept: PromptCache | None,
) -> Iterator[GenerationResponse]:
    handle = offload_of(model)
    before = handle.stats()
    begin = time.perf_counter()
    prompt, limit = request.ids, request.limit
    ids = torch.tensor([prompt], device=model.device)
    cache, cached = kept.take(prompt) if kept is not None else (None, 0)
    logits, cache = forward(model, ids[:, cached:], cache, handle.options.ubatch, ids[:, :cached])
    answer: Answer | None = None
    if handle.decoding is not None:
        longest = handle.options.context
        answer = handle.decoding.begin(model, ids, logits, cache, sampling, limit, longest, ends)
    if answer is None:
        answer = StepByStep(model, ids, logits, cache, sampling)
    del logits, cache
    said = [value := answer()]
    decode_begin = time.perf_counter()
    prompt_seconds = decode_begin - begin
    for count in range(1, limit + 1):
        piece = "" if text is None or value in ends else text.push(value)
        reason = None
        if value in ends or (text is not None and text.stopped):
            reason = "stop"
        elif count == limit:
            reason = "length"
        if reason and text is not None:
            piece += text.finish()
        if reason and kept is not None:
            kept.keep([*prompt, *said[:-1]], answer.cache())
        seconds = time.perf_counter() - decode_begin
        yield GenerationResponse(
            piece,
            value,
            len(prompt),
            cached,
            prompt_seconds,
            (len(prompt) - cached) / prompt_seconds,
            count,
            seconds,
            (count - 1) / seconds if count > 1 else 0.0,
            sum(map(peak_memory, handle.options.devices)),
            reason,
            handle.stats() - before,
        )
        if reason:
            return
        said.append(value := answer())


class StepByStep:
    """Each call gives the next token, which was not begun before."""

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, logits: Tensor, cache: Any, sampling: Sampling
    ) -> None:
        """`logits` [1, V] are of the last of `ids` [1, T], `cache` is what they left."""
        self._model, self._ids, self._logits, self._cache = model, ids, logits, cache
        self._sampler = Sampler(sampling, model.device)
        self._token: Tensor | None = None

    def __call__(self) -> int:
        if self._token is not None:
            self._logits, self._cache = forward(
                self._model, self._token, self._cache, before=self._ids
            )
            self._ids = torch.cat((self._ids, self._token), dim=-1)
        self._token = self._sampler(self._ids, self._logits)
        return int(self._token)  # sync: the text is made on the host

    def cache(self) -> Any:
        return self._cache


@torch.inference_mode()
def forward(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Any,
    ubatch: int = UBATCH,
    before: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """The last token's logits [1, V] after `ids` [1, T], and the KV cache; None begins a
    sequence. At most `ubatch` tokens go through the model at once.

    Goes on with fewer slots when memory runs out; a `cache` of which nothing can be taken back is
    then made anew from `before` [1, L], the ids it holds.
    """
    whole = model.config.get_text_config().model_type in READ_WHOLE

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        size = ubatch if not whole else ids.shape[1] if cache is None else 1
        for chunk in ids.split(size, dim=1):
            out = model(input_ids=chunk, cache=cache, use_cache=True, logits_to_keep=1)
            cache = out.cache
        return out.logits[:, -1], cache

    return recovery.run(step, offload_of(model).engine, ids, cache, before)


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
