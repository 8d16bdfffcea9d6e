"""What `peers.py` wrote, as tables.

python benchmarks/peers_report.py [benchmarks/results/peers-NAME.json]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Pairs whose ratio people ask for: ours over theirs.
PAIRS = (
    ("ours, 4 bits, 25% resident", "accelerate, bf16, CPU and disk"),
    ("ours, 16 bits, 25% resident", "accelerate, bf16, CPU and disk"),
    ("ours, 4 bits, all resident", "transformers, bf16"),
    ("ours, q4, all resident", "llama.cpp, Q4_1"),
    ("ours, q8, all resident", "llama.cpp, Q8_0"),
)
Peer = dict[str, Any]


def ratio(mine: Peer, theirs: Peer, test: str) -> str:
    """Median of the rounds' ratios, and the range they lie in."""
    both = zip(mine[test], theirs[test], strict=False)  # a slow one has fewer rounds
    ratios = [a / b for a, b in both]
    text = f"{statistics.median(ratios):.2f}"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}-{max(ratios):.2f})"


def tables(report: dict[str, Any]) -> str:
    """A row a peer, then a row a pair."""
    load, peers = report["load"], report["peers"]
    tests = {"prefill_ts": f"pp{load['prompt']}", "decode_ts": f"tg{load['decode']}"}
    first, *_ = peers
    heads = [f"{name} t/s | of transformers" for name in tests.values()]
    lines = [
        f"| | peak memory | KL | same greedy | {' | '.join(heads)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for peer in peers:
        check = peer["check"]
        cells = [
            peer["name"],
            f"{peer['peak_memory'] / 2**30:.2f} GiB",
            f"{check['kl_mean']:.4f}",
            f"{check['greedy_same']:.0%}",
        ]
        for test in tests:
            cells += [f"{statistics.median(peer[test]):.1f}", ratio(peer, first, test)]
        lines.append(f"| {' | '.join(cells)} |")
    named = {peer["name"]: peer for peer in peers}
    lines += [
        "",
        f"| ours over theirs | {' | '.join(tests.values())} |",
        "| --- | ---: | ---: |",
        *(
            f"| {ours} / {theirs} | "
            + " | ".join(ratio(named[ours], named[theirs], test) for test in tests)
            + " |"
            for ours, theirs in PAIRS
            if theirs in named
        ),
    ]
    lines += [f"\nLeft out: {name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    for file in sys.argv[1:] or sorted(map(str, RESULTS.glob("peers-*.json"))):
        print(tables(json.loads(Path(file).read_text(encoding="utf-8"))))
