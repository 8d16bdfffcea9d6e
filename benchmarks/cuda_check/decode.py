"""Decode speed of one way to serve experts, beside what the bytes allow.

Knows: how tokens are timed, what is counted around them, which bytes a token must move. Does not
know: how experts are served (`subject`).
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch

from benchmarks.cuda_check.bounds import Bound, Rates
from benchmarks.cuda_check.seam import is_captured, queued_ahead
from benchmarks.cuda_check.subject import Subject
from benchmarks.cuda_check.timing import synchronize
from offload.budget.budget import kv_cache_bytes
from offload.engine.handle import offload_of
from offload.engine.stats import Stats
from offload.generation.stream import forward, stream_generate

TARGET = 0.85  # of the bound


@dataclass(frozen=True)
class Decoded:
    """What came of decoding."""

    tokens_per_second: float
    stats: Stats  # of the timed tokens
    tokens: tuple[int, ...]  # greedy, of the prompt's logits and all after it
    captured: bool  # steps were replayed from a graph

    @property
    def link_bytes(self) -> float:
        """Crossed the link, a token."""
        return self.stats.bytes_loaded / max(1, self.stats.tokens)


def prompt_ids(subject: Subject, count: int) -> list[int]:
    """A prompt; routers do not look at it."""
    vocabulary = subject.model.config.get_text_config().vocab_size
    return [(7 * at + 3) % vocabulary for at in range(count)]


@dataclass(frozen=True)
class Length:
    """How much is decoded: `skipped` tokens before the clock starts, in which a graph is captured,
    and `tokens` after that."""

    prompt: int
    skipped: int
    tokens: int

    @property
    def steps(self) -> int:
        """Tokens that go through the model one by one."""
        return self.skipped + self.tokens

    @property
    def context(self) -> int:
        """Tokens before the one in the middle of those that are timed."""
        return self.prompt + self.skipped + self.tokens // 2


def decode(subject: Subject, length: Length, first_step: int) -> Decoded:
    """Decode through the public generator, routed like the trace from `first_step` on."""
    handle = offload_of(subject.model)
    skipped, tokens = length.skipped, length.tokens
    subject.routes.begin(first_step)
    steps = stream_generate(
        subject.model,
        None,
        prompt_ids(subject, length.prompt),
        max_new_tokens=1 + skipped + tokens,
        temperature=0.0,
    )
    said = [next(steps).token for _ in range(1 + skipped)]
    synchronize(subject.setting.device)  # what is queued ahead is outside of the clock: not counted
    timed = tokens - queued_ahead(handle)
    before, begin = handle.stats(), time.perf_counter()
    said += [step.token for step in steps]
    seconds = time.perf_counter() - begin
    return Decoded(timed / seconds, handle.stats() - before, tuple(said), is_captured(handle))


def bytes_on_device(subject: Subject, context: int) -> float:
    """What a token reads of the device's memory: dense weights, its experts, the KV cache."""
    model, info = subject.model, subject.pack.info
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    dense = sum(tensor.nbytes for tensor in model.parameters())
    if table is not None and (head is None or head.weight is not table.weight):
        dense -= table.weight.nbytes  # a token reads one row
    experts = sum(
        subject.top_k * info.layout_of(index).record_bytes for index in range(len(info.layers))
    )
    return float(dense + experts + sum(kv_cache_bytes(model.config, context, torch.bfloat16)))


def bound_of(subject: Subject, rates: Rates, link_bytes: float, context: int) -> Bound:
    """The least time a token takes at this many bytes over the link."""
    return Bound.of(rates, link_bytes, bytes_on_device(subject, context))


def logits_digest(subject: Subject, prompt: int, tokens: int) -> str:
    """A digest of a prompt's and some tokens' logits, to the last bit."""
    digest = hashlib.sha256()
    subject.routes.begin(0)
    device = subject.setting.device
    ids = torch.tensor([prompt_ids(subject, prompt)], device=device)
    logits, cache = forward(subject.model, ids, None)
    digest.update(logits.float().cpu().numpy().tobytes())
    if not bool(logits.isfinite().all()):
        raise ArithmeticError("logits are not finite")
    for at in range(tokens):
        token = torch.tensor([[5 + at]], device=device)
        logits, cache = forward(subject.model, token, cache)
        digest.update(logits.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
