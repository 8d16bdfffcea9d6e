"""Rows with figures that a test chooses."""

from __future__ import annotations

from offload.bench.row import BenchRow, Sample, Test, row_of
from offload.cache.statistics import LayerCounts
from offload.engine.stats import Stats

MS = 10**6  # ns


def stats(slots: int = 6, hits: int = 3) -> Stats:
    counts = LayerCounts(requests=4, hits=hits, misses=4 - hits)
    return Stats(counts, (counts,), slots, 24, 1000 * (4 - hits), 1e-6, tokens=4)


DECODE = Test(0, 4)


def row(
    test: Test = DECODE,
    *,
    token_ms: tuple[float, ...] = (10, 10, 10, 10),
    repetitions: int = 2,
    slots: int = 6,
    policy: str = "lfru",
    lookahead: bool | None = None,
    bits: str = "q4",
    hits: int = 3,
) -> BenchRow:
    """A row of `repetitions` equal samples; a prompt takes 5 ms."""
    subject = {
        "build": "0",
        "cpu_info": "a CPU",
        "gpu_info": "",
        "backends": "CPU",
        "n_threads": 2,
        "model": "tiny",
        "model_type": "mixtral",
        "model_size": 2**30,
        "model_n_params": 10**9,
        "bits": bits,
        "policy": policy,
        "lookahead": lookahead,
        "text": "real",
        "link_gb_per_s": 10.0,
        "memory_gb_per_s": 20.0,
    }
    times = tuple(round(ms * MS) for ms in token_ms) if test.n_gen else ()
    sample = Sample(5 * MS if test.n_prompt else 0, times, stats(slots, hits))
    return row_of(
        subject,
        test,
        (sample,) * repetitions,
        test_time="2026-01-01T00:00:00Z",
        read_bytes=10**7,
        peak_memory=2**20,
    )
