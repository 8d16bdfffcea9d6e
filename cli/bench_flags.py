"""The flags of `offload bench`.

Knows: llama-bench's names, and which of the shared flags are lists here. Does not know: what is
done with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.flags import add_model_flags, add_timeline
from cli.values import bits, counts, names, pair, positive, switches


def add_bench_flags(bench: argparse.ArgumentParser) -> None:
    """All of them."""
    add_model_flags(bench)
    _add_sweeps(bench)
    tests = bench.add_argument_group("tests", "lists have commas between")
    for short, long, what in (
        ("-p", "--n-prompt", "prefill tokens (512); 0: no such test"),
        ("-n", "--n-gen", "decoded tokens (128); 0: no such test"),
        ("-d", "--n-depth", "tokens before each test (0)"),
    ):
        tests.add_argument(short, long, type=counts, action="extend", metavar="N,..", help=what)
    tests.add_argument(
        "-pg",
        type=pair,
        action="append",
        default=[],
        metavar="P,N",
        help="also prefill P and decode N in one test; more than once for more",
    )
    tests.add_argument(
        "-r", "--repetitions", type=positive, default=5, metavar="N", help="of each test (5)"
    )
    tests.add_argument("--no-warmup", action="store_true", help="time the first run too")
    tests.add_argument(
        "--random", action="store_true", help="random tokens, as llama-bench, not real text"
    )
    output = bench.add_argument_group("output")
    output.add_argument(
        "-o", "--output", choices=("md", "csv", "json", "jsonl"), default="md", help="format (md)"
    )
    output.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw tokens/s and hit rate against residency"
    )
    output.add_argument(
        "--compare", metavar="FILE", help="also give the ratio to what -o json wrote before"
    )
    add_timeline(bench)


def _add_sweeps(bench: argparse.ArgumentParser) -> None:
    """In place of flags with one value each."""
    sweeps = bench.add_argument_group(
        "sweeps",
        "lists have commas between; the model is loaded for every combination",
        conflict_handler="resolve",
    )
    sweeps.add_argument(
        "--expert-slots",
        type=names,
        default=[None],
        metavar="N,..",
        help="resident experts, numbers or shares like 25%%,50%%",
    )
    sweeps.add_argument(
        "--expert-bits",
        type=bits,
        default=[None],
        metavar="N,..",
        help="2, 3, 4, 5, 6, 8, or 16 = as stored (4)",
    )
    sweeps.add_argument(
        "--policy",
        type=names,
        default=["lfru"],
        metavar="NAME,..",
        help="who is evicted: lru, slru, lfru, lfu, fifo (lfru)",
    )
    sweeps.add_argument(
        "--lookahead",
        type=switches,
        nargs="?",
        default=[None],
        const=[True],
        metavar="on,off,auto",
        help="load what the router will probably want next (auto: while it pays; where a device "
        "plans, on)",
    )
    sweeps.add_argument(
        "--no-lookahead", dest="lookahead", action="store_const", const=[False], help="the same off"
    )
    sweeps.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="load first what was hot in the run before, keep what was in this one (off)",
    )
