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
    ("ours, 4 bits, 25% resident", "accelerate eager, bf16, memory of 4 bits 25%"),
    ("ours, 16 bits, 25% resident", "accelerate eager, bf16, memory of 16 bits 25%"),
    ("ours, 4 bits, all resident", "transformers eager, bf16"),
    ("ours, 4 bits, all resident", "transformers grouped_mm, bf16"),
    ("ours, q4, all resident", "llama.cpp, Q4_1"),
    ("ours, q8, all resident", "llama.cpp, Q8_0"),
)
PAIR_RULE = "| --- | ---: | ---: |"
Peer = dict[str, Any]


def ratio(mine: Peer, theirs: Peer, test: str) -> str:
    """Median of the rounds' ratios, and the range they lie in."""
    both = zip(mine[test], theirs[test], strict=False)  # a slow one has fewer rounds
    ratios = [a / b for a, b in both]
    text = f"{statistics.median(ratios):.2f}"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}-{max(ratios):.2f})"


def tables(report: dict[str, Any]) -> str:
    """A row a peer, then a row a pair of which both are there, then what has to be known."""
    load, peers = report["load"], report["peers"]
    tests = {"prefill_ts": f"pp{load['prompt']}", "decode_ts": f"tg{load['decode']}"}
    named = {peer["name"]: peer for peer in peers}
    reference = named.get(report["reference"])
    heads = [f"{name} t/s | of {report['reference']}" for name in tests.values()]
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
            of_reference = ratio(peer, reference, test) if reference else "-"
            cells += [f"{statistics.median(peer[test]):.1f}", of_reference]
        lines.append(f"| {' | '.join(cells)} |")
    pairs = [(named[a], named[b]) for a, b in PAIRS if a in named and b in named]
    if pairs:
        lines += ["", f"| ours over theirs | {' | '.join(tests.values())} |", PAIR_RULE]
    for mine, theirs in pairs:
        ratios = " | ".join(ratio(mine, theirs, test) for test in tests)
        lines.append(f"| {mine['name']} / {theirs['name']} | {ratios} |")
    lines += ["", *_notes(peers, load)]
    for name, why in report["left_out"].items():
        *_, last = why.strip().splitlines()  # of a traceback: what went wrong
        lines.append(f"Left out: {name}: {last}")
    return "\n".join(lines)


def _notes(peers: list[Peer], load: dict[str, int]) -> list[str]:
    """What is counted as the same memory, and who ran less than the others."""
    given = [peer for peer in peers if peer["memory"] is not None]
    notes = [
        f"{peer['name']}: {peer['memory'] / 2**20:.0f} MiB for weights, what dense weights and "
        "slots of ours take."
        for peer in given
    ]
    if given:
        notes.append(
            "Same memory counts these weights alone. Pages of mapped files, which the system can "
            "take back, count in no one's and are in the peak: our pack, accelerate's folder."
        )
    for peer in peers:
        rounds = min(peer["rounds"] or load["rounds"], load["rounds"])
        decode = min(peer["decode"] or load["decode"], load["decode"])
        if (rounds, decode) != (load["rounds"], load["decode"]):
            notes.append(
                f"{peer['name']}: {rounds} of {load['rounds']} rounds, {decode} of "
                f"{load['decode']} tokens decoded in each."
            )
    return notes


if __name__ == "__main__":
    for file in sys.argv[1:] or sorted(map(str, RESULTS.glob("peers-*.json"))):
        print(tables(json.loads(Path(file).read_text(encoding="utf-8"))))
