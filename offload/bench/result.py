"""A test's figures.

Knows: what follows from its samples; llama-bench's keys, and ours. Does not know: which model and
settings they belong to (`subject`), how they are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from offload.bench.bound import Bound
from offload.bench.sample import Sample
from offload.bench.tests import Test
from offload.engine.stats import Stats

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
