"""Decode speed of the demo while other programs keep cores busy: with all threads, with one, and
with as many as the runtime chooses.

    python benchmarks/busy.py [--programs 2] [--output benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import RESULTS, machine

import offload
from offload.engine.handle import offload_of
from offload.machine.threads import Threads

TOKENS, REPEATS = 48, 4
SETTLE_SECONDS = 3  # until the number of threads has followed


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2, help="most busy programs")
    parser.add_argument("--output", type=Path, default=RESULTS / "busy-cpu.json")
    arguments = parser.parse_args()
    model, tokenizer = offload.load("demo", device="cpu")
    handle, most = offload_of(model), torch.get_num_threads()

    def decode() -> float:
        """Tokens/s of one answer."""
        steps = offload.stream_generate(
            model, tokenizer, "The sky is blue because", temperature=0, max_new_tokens=TOKENS
        )
        return [step.generation_tps for step in steps][-1]

    decode()
    rows = []
    print("| busy programs | threads | t/s |\n| ---: | --- | ---: |")
    for programs in range(arguments.programs + 1):
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)
        ]
        try:
            for threads in (str(most), "1", "follow"):
                torch.set_num_threads(most if threads == "follow" else int(threads))
                handle.threads = Threads() if threads == "follow" else None
                end = time.monotonic() + SETTLE_SECONDS
                while time.monotonic() < end:
                    decode()
                speeds = [decode() for _ in range(REPEATS)]
                print(
                    f"| {programs} | {threads} | {statistics.median(speeds):.1f} "
                    f"± {statistics.stdev(speeds):.1f} |"
                )
                rows.append({"programs": programs, "threads": threads, "samples_ts": speeds})
        finally:
            for other in others:
                other.kill()
    arguments.output.write_text(json.dumps({**machine(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
