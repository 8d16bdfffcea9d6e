"""One command for a GPU machine: what works there and how fast, beside what the machine can do.

Tests that need a GPU; rates of the link and of memory; kernels; decode and prefill of synthetic
models with the shapes of real ones, by every engine, at several residencies, and naively. Needs no
download. Prints tables at the end; results are in a JSON file with the hardware's name from the
first figure on. Each part is a process of its own with a time of its own.

    benchmarks/cuda_check.sh [--out DIR] [--work DIR] [--only link,kernels] [--gib 26]
    benchmarks/cuda_check.sh --rehearse      on the CPU, tiny, in one process: nothing is measured

Without CUDA it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 465.0


def main(arguments: list[str] | None = None) -> int:
    """Check this machine; returns the exit code."""
    given = _parse(arguments)
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import torch

    from benchmarks.cuda_check.check import Check, run_part
    from benchmarks.cuda_check.setting import Setting

    if not given.rehearse and not torch.cuda.is_available():
        print("cuda_check: torch sees no CUDA device here, so nothing was measured")
        return 0
    pack_bytes = int(given.gib * 2**30)
    if given.part:
        setting = Setting(False, given.work, given.seconds, pack_bytes)
        return run_part(given.part, setting, given.into)
    if given.rehearse:
        print("REHEARSAL on the CPU, tiny shapes: NOTHING IS MEASURED, no figure means anything")
    with tempfile.TemporaryDirectory(prefix="cuda-check-", dir=given.work) as work:
        scratch = Path(work)
        out = given.out or (scratch if given.rehearse else RESULTS)
        check = Check(out, scratch, given.seconds, pack_bytes, given.rehearse)
        check.run([name for name in given.only.split(",") if name])
        print(check.report())
    if given.rehearse:
        print("\nREHEARSAL: nothing was measured, every figure above is meaningless")
    if out != scratch:
        print(f"\nwritten to {check.into}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "cuda_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON file (benchmarks/results)")
    parser.add_argument("--work", type=Path, help="folder for packs (the system's temporary one)")
    parser.add_argument("--only", default="", help="these parts, by commas: the tables' names")
    parser.add_argument("--gib", type=float, default=26.0, help="the most of one model's experts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, measuring nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run it in this process
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # this results file
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
