"""Hit rates of every policy and allocation on the recorded demo traces, Belady's ceiling beside.

Then the same with look-ahead. Prints tables, writes JSON. Plain Python: no model is loaded.

    python benchmarks/policies.py [--traces FOLDER] [--output benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from offload.cache.allocation import ALLOCATIONS
from offload.cache.guesses import MOST_AHEAD, PREDICTORS
from offload.cache.policies import POLICIES
from offload.cache.trace.file import read
from offload.cache.trace.replay import BELADY, NONE, Setup, replay
from offload.cache.trace.trace import Trace

HERE = Path(__file__).parent
SHARES = (0.10, 0.25, 0.50, 0.75)


def measure(traces: dict[str, Trace], setup: Setup) -> dict[str, Any]:
    """Figures of one setup on each trace."""
    outcomes = {name: replay(trace, setup) for name, trace in traces.items()}
    row: dict[str, Any] = {
        "slots": setup.slots,
        "policy": setup.policy,
        "allocation": setup.allocation,
        "lookahead": setup.lookahead,
        "layers_ahead": setup.ahead if setup.lookahead != NONE else 0,
        "hit_rate": {name: round(o.counts.hit_rate, 4) for name, o in outcomes.items()},
        "loads_per_token": round(fmean(o.loads_per_token for o in outcomes.values()), 2),
    }
    if setup.lookahead != NONE:
        counts = [o.counts for o in outcomes.values()]
        row["precision"] = round(fmean(c.lookahead_precision for c in counts), 4)
        row["recall"] = round(fmean(c.lookahead_recall for c in counts), 4)
        row["loads_right"] = round(
            sum(c.lookahead_loads_right for c in counts)
            / max(1, sum(c.lookahead_loads for c in counts)),
            4,
        )
    row["mean_hit_rate"] = round(fmean(row["hit_rate"].values()), 4)
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
        ceiling = measure(traces, Setup(slots, BELADY))
        rows.append(ceiling)
        for allocation in ALLOCATIONS:
            rows += [measure(traces, Setup(slots, policy, allocation)) for policy in POLICIES]
        guessed.append(ceiling)
        guessed += [
            measure(traces, Setup(slots, "lfru", "shared", predictor, ahead))
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
