"""Measuring tokens/second the way llama-bench does, with the experts' figures beside.

Knows: what a test is (prefill p tokens, decode n, at a depth) and how it is timed. Does not know:
how a table is printed (`cli`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pydoc_data import topics
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine import Engine
from offload.errors import GenerationError
from offload.generation import forward
from offload.handle import offload_of
from offload.stats import Stats


@dataclass(frozen=True)
class Test:
    """Prefill `n_prompt` tokens, then decode `n_gen`, after `n_depth` tokens that are not timed."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        return self.n_prompt + self.n_gen


@dataclass(frozen=True)
class Result:
    """One test's timings and what the experts did during them."""

    test: Test
    test_time: str
    samples_ns: tuple[int, ...]
    experts: Stats  # of all samples together
    link_ceiling_gb_per_s: float

    @property
    def samples_ts(self) -> tuple[float, ...]:
        return tuple(self.test.tokens / ns * 1e9 for ns in self.samples_ns)

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    @property
    def link_share(self) -> float:
        """Bytes loaded a second of the test over what the link can do."""
        rate = self.experts.bytes_loaded / sum(self.samples_ns)  # bytes/ns = GB/s
        return rate / self.link_ceiling_gb_per_s if self.link_ceiling_gb_per_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """llama-bench's keys, then ours."""
        return {
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.test.n_depth,
            "test_time": self.test_time,
            "avg_ns": round(statistics.fmean(self.samples_ns)),
            "stddev_ns": round(statistics.stdev(self.samples_ns))
            if len(self.samples_ns) > 1
            else 0,
            "avg_ts": self.avg_ts,
            "stddev_ts": self.stddev_ts,
            "samples_ns": list(self.samples_ns),
            "samples_ts": list(self.samples_ts),
            "expert_slots": self.experts.slots,
            "total_experts": self.experts.total_experts,
            "hit_rate": self.experts.counts.hit_rate,
            "mib_per_token": self.experts.mib_per_token,
            "wait_seconds": self.experts.counts.wait_seconds,
            "lookahead_precision": self.experts.counts.lookahead_precision,
            "lookahead_recall": self.experts.counts.lookahead_recall,
            "link_ceiling_gb_per_s": self.link_ceiling_gb_per_s,
            "link_share": self.link_share,
        }


def real_text(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` tokens of English: Python's own documentation, which every Python carries."""
    ids: list[int] = []
    for name in sorted(topics.topics):
        ids += tokenizer(topics.topics[name], add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    return (ids * -(-count // len(ids)))[:count]


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """`count` tokens as llama-bench feeds them; they flatter or ruin a cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tests: list[Test],
    *,
    repetitions: int = 5,
    warmup: bool = True,
    random: bool = False,
) -> Iterator[Result]:
    """Time each test `repetitions` times; yields a result as soon as a test is done.

    Decoding is fed real text token by token (or random tokens), so that routing follows text and
    does not depend on what the model would say.
    """
    context = offload_of(model).options.context
    longest = max(test.n_depth + test.tokens for test in tests)
    if longest > context:
        raise GenerationError(
            f"a test needs {longest} tokens of context, it holds {context}: raise --ctx-size"
        )
    if tokenizer is None and not random:
        raise GenerationError("the model has no tokenizer for real text: pass --random")
    if random or tokenizer is None:
        ids = random_tokens(model.config.get_text_config().vocab_size, longest)
    else:
        ids = real_text(tokenizer, longest)
    return _run(model, tests, ids, repetitions, warmup)


def _run(
    model: PreTrainedModel, tests: list[Test], ids: list[int], repetitions: int, warmup: bool
) -> Iterator[Result]:
    ceiling = measure_link(offload_of(model).engine)
    for test in tests:
        if warmup:
            _once(model, test, ids)
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        total: Stats | None = None
        samples = []
        for _ in range(repetitions):
            ns, experts = _once(model, test, ids)
            samples.append(ns)
            total = experts if total is None else total + experts
        assert total is not None
        yield Result(test, when, tuple(samples), total, ceiling)


def _once(model: PreTrainedModel, test: Test, ids: list[int]) -> tuple[int, Stats]:
    """One timed run: nanoseconds, and what the experts did in them."""
    tokens = torch.tensor([ids], device=model.device)
    cache = None
    at, ubatch = test.n_depth, offload_of(model).options.ubatch
    if at:
        _, cache = forward(model, tokens[:, :at], None, ubatch)
    _sync(model.device)
    before = offload_of(model).stats()
    begin = time.perf_counter_ns()
    if test.n_prompt:
        _, cache = forward(model, tokens[:, at : at + test.n_prompt], cache, ubatch)
        at += test.n_prompt
    for _ in range(test.n_gen):
        _, cache = forward(model, tokens[:, at : at + 1], cache)
        at += 1
    _sync(model.device)
    return time.perf_counter_ns() - begin, offload_of(model).stats() - before


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_link(engine: Engine, copies: int = 64) -> float:
    """GB/s of whole records copied back to back: the ceiling that loads stand beside."""
    transfer, layer = engine.transfer, engine.layers[0]
    held = engine.cache.table.key_in(0)
    experts = [i % layer.num_experts for i in range(layer.num_experts + copies)]

    def copy(chosen: list[int]) -> float:
        tickets = [transfer.start(layer.index, expert, 0, urgent=True) for expert in chosen]
        for ticket in tickets:
            transfer.wait(ticket)
        _sync(transfer.device)
        return transfer.busy_seconds

    try:
        before = copy(experts[: layer.num_experts])  # the first touch reads the disk, checks sums
        seconds = copy(experts[layer.num_experts :]) - before
    finally:
        if held is not None:
            transfer.wait(transfer.start(*held, 0, urgent=True))
    return copies * engine.record_bytes(layer.index) / 1e9 / seconds
