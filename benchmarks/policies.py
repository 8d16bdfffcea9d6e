"""Hit rates of every policy and allocation on the recorded demo traces, Belady's ceiling beside.

Then the same with look-ahead. What lost in these tables, and is no longer part of the product, is
in `benchmarks/losers.py`. Prints tables, writes JSON. Plain Python: no model is loaded.

    python benchmarks/policies.py [--traces FOLDER] [--output benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from losers import FIFO, MOST_AHEAD, PREDICTORS, SLRU, Guesser, QuotaCache

from offload.cache.cache import ExpertCache
from offload.cache.policies import HALF_LIFE, LFRU, Policy
from offload.cache.sharded import Cache
from offload.cache.trace.file import read
from offload.cache.trace.replay import (
    BELADY,
    NONE,
    REPLAYED,
    OnePool,
    Setup,
    make_cache,
    replay_with,
)
from offload.cache.trace.trace import Event, Guess, Trace

HERE = Path(__file__).parent
SHARES = (0.10, 0.25, 0.50, 0.75)
POLICIES: dict[str, Callable[[], Policy]] = {**REPLAYED, "slru": SLRU, "fifo": FIFO}


def with_one_pool(slots: int, layers: int, policy: Callable[[], Policy]) -> ExpertCache:
    """One pool for all layers, whose clock advances at every step of a layer."""
    if policy is LFRU:
        policy = functools.partial(LFRU, HALF_LIFE * layers)
    return ExpertCache(slots, layers, policy, OnePool)


ALLOCATIONS: dict[str, Callable[[int, int, Callable[[], Policy]], ExpertCache]] = {
    "shared": ExpertCache,
    "global": with_one_pool,
    "quota": QuotaCache,
}


def measure(
    traces: dict[str, Trace],
    slots: int,
    policy: str,
    allocation: str = "shared",
    predictor: str = NONE,
    ahead: int = 0,
) -> dict[str, Any]:
    """The figures of one way to run a cache, on each trace."""
    hits, counts, loads = {}, [], []
    for name, trace in traces.items():
        setup = Setup(slots, policy if policy == BELADY else "lru")  # says whether all may evict
        layers = trace.header.layers
        cache: Cache
        if policy == BELADY:
            cache = make_cache(trace, setup)
        else:
            cache = ALLOCATIONS[allocation](slots, layers, POLICIES[policy])
        guess: Callable[[Event], Iterable[Guess]] = (
            (lambda _: ()) if predictor == NONE else Guesser(predictor, ahead, layers)
        )
        replay_with(trace, cache, setup, guess)
        counts.append(cache.statistics.total())
        hits[name] = round(counts[-1].hit_rate, 4)
        loads.append(counts[-1].loads / trace.tokens)
    row: dict[str, Any] = {
        "slots": slots,
        "policy": policy,
        "allocation": allocation,
        "lookahead": predictor,
        "layers_ahead": ahead,
        "hit_rate": hits,
        "loads_per_token": round(fmean(loads), 2),
    }
    if predictor != NONE:
        row["precision"] = round(fmean(c.lookahead_precision for c in counts), 4)
        row["recall"] = round(fmean(c.lookahead_recall for c in counts), 4)
        right = sum(c.lookahead_loads_right for c in counts)
        row["loads_right"] = round(right / max(1, sum(c.lookahead_loads for c in counts)), 4)
    row["mean_hit_rate"] = round(fmean(hits.values()), 4)
    return row


def print_rows(rows: Sequence[dict[str, Any]], total: int, extra: Sequence[str] = ()) -> None:
    """A Markdown table; `of Belady` compares with the row of the same slots."""
    ceiling = {r["slots"]: r["mean_hit_rate"] for r in rows if r["policy"] == BELADY}
    names = list(rows[0]["hit_rate"])
    head = ["resident", "policy", *names, "mean", "of Belady", "loads/token", *extra]
    print(f"| {' | '.join(head)} |\n| --- | --- |{' ---: |' * (len(head) - 2)}")
    for row in rows:
        row["of_belady"] = round(row["mean_hit_rate"] / ceiling[row["slots"]], 4)
        name = row["policy"] if row["policy"] == BELADY else f"{row['policy']}, {row['allocation']}"
        if row["lookahead"] != NONE:
            name += f", {row['lookahead']} +{row['layers_ahead']}"
        cells = [f"{row['slots'] / total:.0%}", name]
        cells += [f"{row['hit_rate'][trace]:.1%}" for trace in names]
        cells += [f"{row['mean_hit_rate']:.1%}", f"{row['of_belady']:.1%}"]
        cells += [f"{row['loads_per_token']:.1f}"]
        cells += [f"{row[name]:.1%}" if name in row else "" for name in extra]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "policies-demo.json")
    arguments = parser.parse_args()
    traces = {path.stem: read(path) for path in sorted(arguments.traces.glob("*.trace"))}
    total = next(iter(traces.values())).header.total_experts

    rows, guessed = [], []
    for share in SHARES:
        slots = round(share * total)
        ceiling = measure(traces, slots, BELADY)
        rows.append(ceiling)
        for allocation in ALLOCATIONS:
            rows += [measure(traces, slots, policy, allocation) for policy in POLICIES]
        guessed.append(ceiling)
        guessed += [
            measure(traces, slots, "lfru", "shared", predictor, ahead)
            for predictor in PREDICTORS
            for ahead in range(1, MOST_AHEAD + 1)
        ]
    print_rows(rows, total)
    print("\nWith look-ahead:\n")
    print_rows(guessed, total, ("precision", "recall", "loads_right"))
    report = {
        "traces": {
            name: {"tokens": trace.tokens, "generated": trace.generated}
            for name, trace in traces.items()
        },
        "policies": rows,
        "lookahead": guessed,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
