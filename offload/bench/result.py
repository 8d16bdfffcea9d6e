"""A test's figures.

Knows: what follows from its samples; llama-bench's keys, and ours. Does not know: which model and
settings they belong to (`subject`), how they are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from offload.bench.sample import Sample, Test
from offload.budget.budget import kv_cache_bytes
from offload.engine.handle import offload_of
from offload.engine.stats import Stats
from offload.machine.measure import processor_name
from offload.pack.recipe import bits_name
from offload.version import __version__


@dataclass(frozen=True)
class Rates:
    """What this machine's link and memory were measured to do, in 10^9 bytes a second."""

    link_gb_per_s: float
    memory_gb_per_s: float


@dataclass(frozen=True)
class Bound:
    """The bytes of a test's runs, and the least time for them."""

    tokens: int
    link_bytes: int
    read_bytes: int
    rates: Rates

    @property
    def link_seconds(self) -> float:
        return self.link_bytes / 1e9 / self.rates.link_gb_per_s if self.link_bytes else 0.0

    @property
    def memory_seconds(self) -> float:
        return self.read_bytes / 1e9 / self.rates.memory_gb_per_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.link_seconds + self.memory_seconds)

    @property
    def limited_by(self) -> str:
        """What most of the bound's time goes to."""
        return "link" if self.link_seconds > self.memory_seconds else "memory"


def bound_of(
    model: PreTrainedModel, test: Test, samples: tuple[Sample, ...], rates: Rates
) -> Bound:
    """The bound of `samples` of `test` together."""
    engine, ubatch = offload_of(model).engine, offload_of(model).fit.ubatch
    calls = [min(ubatch, test.n_prompt - at) for at in range(0, test.n_prompt, ubatch)]
    calls += [1] * test.n_gen
    each = len(calls) * dense_bytes(model)
    held = test.n_depth
    for tokens in calls:
        held += tokens
        each += kv_cache_bytes(model.config, held, model.dtype)
    records = sum(
        counts.requests * engine.record_bytes(layer)
        for sample in samples
        for layer, counts in enumerate(sample.experts.layers)
    )
    return Bound(
        tokens=test.tokens * len(samples),
        link_bytes=sum(sample.experts.bytes_copied for sample in samples),
        read_bytes=each * len(samples) + records,
        rates=rates,
    )


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes of what is not experts that one call of the model reads."""
    info = offload_of(model).pack.info
    size = info.dense_bytes(model.dtype.itemsize)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None or head is None or model.config.get_text_config().tie_word_embeddings:
        return size
    path = next(name for name, module in model.named_modules() if module is table)
    for dense in info.dense:
        if path in dense.modules:
            return size - (len(dense.modules) == 1) * info.dense_layout(dense).record_bytes
    return size - int(table.weight.nbytes)


PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Result:
    """One test's timings and what the experts did during them."""

    test: Test
    test_time: str
    samples: tuple[Sample, ...]
    bound: Bound
    peak_memory: int  # bytes, while this test ran

    @property
    def samples_ns(self) -> tuple[int, ...]:
        return tuple(sample.ns for sample in self.samples)

    @property
    def samples_ts(self) -> tuple[float, ...]:
        return tuple(self.test.tokens / ns * 1e9 for ns in self.samples_ns)

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return spread(self.samples_ts)

    @cached_property
    def experts(self) -> Stats:
        """Of all samples together."""
        first, *rest = (sample.experts for sample in self.samples)
        return sum(rest, first)

    @property
    def resident(self) -> float:
        """Share of the experts that have a slot."""
        return self.experts.slots / self.experts.total_experts

    @property
    def first_token_ns(self) -> float | None:
        """From the prompt to the logits of the first new token; None without a prompt."""
        if not self.test.n_prompt:
            return None
        return statistics.fmean(sample.prompt_ns for sample in self.samples)

    @cached_property
    def token_ns(self) -> dict[int, float | None]:
        """Percentile -> time of a decoded token, over all samples; None where none is decoded."""
        times = sorted(ns for sample in self.samples for ns in sample.token_ns)
        return {p: percentile(times, p) if times else None for p in PERCENTILES}

    @property
    def link_share(self) -> float:
        """Bytes copied a second of the test over what the link can do."""
        rate = self.experts.bytes_copied / sum(self.samples_ns)  # bytes/ns = GB/s
        ceiling = self.bound.rates.link_gb_per_s
        return rate / ceiling if ceiling else 0.0

    @property
    def bound_share(self) -> float:
        """Of the speed that bytes and bandwidths allow, how much was reached."""
        seconds = self.bound.link_seconds + self.bound.memory_seconds
        return seconds / (sum(self.samples_ns) / 1e9)

    def to_json(self) -> dict[str, Any]:
        """llama-bench's keys, then ours."""
        experts, bound = self.experts, self.bound
        return {
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.test.n_depth,
            "test_time": self.test_time,
            "avg_ns": round(statistics.fmean(self.samples_ns)),
            "stddev_ns": round(spread(self.samples_ns)),
            "avg_ts": self.avg_ts,
            "stddev_ts": self.stddev_ts,
            "samples_ns": list(self.samples_ns),
            "samples_ts": list(self.samples_ts),
            "expert_slots": experts.slots,
            "total_experts": experts.total_experts,
            "hit_rate": experts.counts.hit_rate,
            "mib_per_token": experts.mib_per_token,
            "wait_seconds": experts.counts.wait_seconds,
            "lookahead_precision": experts.counts.lookahead_precision,
            "lookahead_recall": experts.counts.lookahead_recall,
            "link_gb_per_s": bound.rates.link_gb_per_s,
            "link_share": self.link_share,
            "first_token_ns": self.first_token_ns,
            **{f"token_p{p}_ns": ns for p, ns in self.token_ns.items()},
            "peak_memory": self.peak_memory,
            "memory_gb_per_s": bound.rates.memory_gb_per_s,
            "link_bytes": bound.link_bytes,
            "read_bytes": bound.read_bytes,
            "bound_ts": bound.tokens_per_s,
            "bound_share": self.bound_share,
            "bound_limit": bound.limited_by,
        }


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """`share` percent of `ordered`, which is not empty, lie at or below this value; between two of
    them it is interpolated."""
    at = (len(ordered) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Subject:
    """The part of a row that its tests share; llama-bench's names where it has them."""

    build: str
    cpu_info: str
    gpu_info: str
    backends: str
    n_threads: int
    model: str
    model_type: str
    model_size: int  # bytes of the pack
    model_n_params: int
    bits: str
    policy: str
    lookahead: bool | None  # None: while it pays; on the device as True
    text: str  # "real" or "random"

    @classmethod
    def of(cls, model: PreTrainedModel, *, random: bool) -> Subject:
        """Of a loaded model."""
        offload = offload_of(model)
        device, options = offload.fit.device, offload.fit.options
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(
            build=__version__,
            cpu_info=processor_name(),
            gpu_info=gpu,
            backends=device.type.upper(),
            n_threads=torch.get_num_threads(),
            model=offload.pack.info.source,
            model_type=str(model.config.model_type),
            model_size=offload.pack.total_bytes,
            model_n_params=offload.pack.parameters,
            bits=bits_name(offload.pack.info),
            policy=options.policy,
            lookahead=options.lookahead,
            text="random" if random else "real",
        )

    @property
    def name(self) -> str:
        """The model and its bits."""
        return f"{self.model} {self.bits}"

    @property
    def lookahead_name(self) -> str:
        return {True: "on", False: "off", None: "auto"}[self.lookahead]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
