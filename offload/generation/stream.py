"""One prompt is answered token by token, with the timings of every step."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import TokenSource, offload_of
from offload.engine.stats import Stats
from offload.generation.prompt import Prompt, PromptCache, check_request, end_tokens
from offload.generation.recovery import read_until_it_fits
from offload.generation.sampler import Sampler
from offload.generation.text import Answer
from offload.sampling import Sampling, SamplingKeywords, resolve_sampling
from offload.units import READ_WHOLE, UBATCH


@dataclass(frozen=True)
class GenerationResponse:
    """One step of `stream_generate`; the last one has a `finish_reason` and the final figures."""

    text: str  # what is new since the previous step
    token: int
    prompt_tokens: int
    cached_tokens: int  # how many of the prompt's tokens were still in the KV cache
    prompt_seconds: float  # duration of the prefill, including the choice of the first token
    prompt_tps: float  # tokens/s of the prefill, without the cached tokens
    generation_tokens: int
    generation_seconds: float  # duration of the decode so far
    generation_tps: float  # tokens/s of the decode, without the first token
    peak_memory: int  # bytes: allocated on the GPUs, or resident in the process
    finish_reason: str | None  # "stop" (end of sequence or stop string), "length", or None
    experts: Stats  # counted since this generation began


def timings(response: GenerationResponse) -> str:
    """The line that llama.cpp prints after an answer."""
    return (
        f"[ Prompt: {response.prompt_tps:.1f} t/s | Generation: {response.generation_tps:.1f} t/s ]"
    )


def verbose_rows(response: GenerationResponse, load_seconds: float) -> str:
    """The rows that ollama prints after an answer. As in ollama, the load duration appears only
    when the answer waited for the model, and the prompt count leaves out tokens from the cache."""
    cached = response.cached_tokens
    read = f"{response.prompt_tokens - cached} token(s)" + (
        f" (+{cached} cached)" if cached else ""
    )
    seconds = load_seconds + response.prompt_seconds + response.generation_seconds
    rows = [
        ("total duration", _duration(seconds)),
        *([("load duration", _duration(load_seconds))] if load_seconds else []),
        ("prompt eval count", read),
        ("prompt eval duration", _duration(response.prompt_seconds)),
        ("prompt eval rate", f"{response.prompt_tps:.2f} tokens/s"),
        ("eval count", f"{response.generation_tokens} token(s)"),
        ("eval duration", _duration(response.generation_seconds)),
        ("eval rate", f"{response.generation_tps:.2f} tokens/s"),
    ]
    return "\n".join(f"{name + ':':<22}{value}" for name, value in rows)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}ms" if seconds < 1 else f"{seconds:.2f}s"


def stream_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    skip_special_tokens: bool = True,
    prompt_cache: PromptCache | None = None,
    **sampling: Unpack[SamplingKeywords],
) -> Iterator[GenerationResponse]:
    """Answer `prompt`, which is a text, a list of `{"role", "content"}` messages, or a list of ids.

    A text is given to the model as it stands, messages go through the chat template. Sampling
    parameters that are not given come from the checkpoint's `generation_config`; the answer is
    greedy if that does not ask for sampling. `max_new_tokens` defaults to the config's value,
    otherwise 256. The text ends before a stop string. With a `prompt_cache`, only the part of the
    prompt that differs from the previous prompt and its answer is read again. Raises
    `GenerationError` before the first step.
    """
    resolved = resolve_sampling(model.generation_config, **sampling)
    request = check_request(model, tokenizer, prompt, max_new_tokens, stop_strings)
    ends = end_tokens(model, tokenizer)
    answer = Answer(request, tokenizer, ends, skip_special_tokens)
    return _stream(model, answer, resolved, ends, prompt_cache)


def _stream(
    model: PreTrainedModel,
    answer: Answer,
    sampling: Sampling,
    ends: frozenset[int],
    kept: PromptCache | None,
) -> Iterator[GenerationResponse]:
    handle = offload_of(model)
    before = handle.stats()
    begin = time.perf_counter()
    prompt, limit = answer.request.ids, answer.request.limit
    ids = torch.tensor([prompt], device=model.device)
    cache, cached = kept.take(prompt) if kept is not None else (None, 0)
    logits, cache = forward(model, ids[:, cached:], cache, handle.fit.ubatch, ids[:, :cached])
    source: TokenSource | None = None
    if handle.decoding is not None:
        longest = handle.fit.options.context
        source = handle.decoding.begin(model, ids, logits, cache, sampling, limit, longest, ends)
    if source is None:
        source = StepByStep(model, ids, logits, cache, sampling)
    del logits, cache
    token = source()
    decode_begin = time.perf_counter()
    prompt_seconds = decode_begin - begin
    while True:
        piece, count = answer.push(token), len(answer.tokens)
        if answer.finish_reason and kept is not None:
            kept.keep([*prompt, *answer.tokens[:-1]], source.cache())
        seconds = time.perf_counter() - decode_begin
        yield GenerationResponse(
            piece,
            token,
            len(prompt),
            cached,
            prompt_seconds,
            (len(prompt) - cached) / prompt_seconds,
            count,
            seconds,
            (count - 1) / seconds if count > 1 else 0.0,
            sum(map(peak_memory, handle.fit.devices)),
            answer.finish_reason,
            handle.stats() - before,
        )
        if answer.finish_reason:
            return
        token = source()


class StepByStep:
    """An answer whose next token is computed only when it is asked for."""

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, logits: Tensor, cache: Any, sampling: Sampling
    ) -> None:
        """`ids` [1, T] are read: `logits` [1, V] belong to the last id, `cache` holds all."""
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
        return int(self._token)  # sync: the host turns the token into text

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
    """Read `ids` [1, T] and return the logits [1, V] of the last token and the KV cache.

    `cache` None begins a sequence. At most `ubatch` tokens go through the model at once. When
    memory runs out, slots are given back and the step is repeated. If `cache` cannot be restored
    to its state before the step, it is rebuilt from `before` [1, L], the ids that it holds.
    """
    whole = model.config.get_text_config().model_type in READ_WHOLE

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        size = ubatch if not whole else ids.shape[1] if cache is None else 1
        for chunk in ids.split(size, dim=1):
            out = model(input_ids=chunk, cache=cache, use_cache=True, logits_to_keep=1)
            cache = out.cache
        return out.logits[:, -1], cache

    return read_until_it_fits(step, offload_of(model).engine, ids, cache, before)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, or resident in this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
