"""Kernels compiled by several processes at once, before any is timed.

Knows: that Triton keeps what it compiled on the disk, for whoever asks next. Does not know: how
fast kernels are. `python -m benchmarks.cuda_check.compiling SCHEME` is one such process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cuda_check.products import make_products
from benchmarks.cuda_check.shapes import CASES

ROOT = Path(__file__).parents[2]
PROMPT = 2048
FEW = 2  # slots: what is compiled does not depend on how many there are


def compile_all(schemes: Sequence[str], seconds: float) -> float:
    """Have the kernels of every scheme compiled, a process each, and wait for at most `seconds`;
    returns how long it took. What is not done by then is compiled when it is first used."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.cuda_check.compiling"]
    width = max(1, (os.cpu_count() or 2) // 2)
    waiting = list(schemes)
    running: list[subprocess.Popen[bytes]] = []
    while (waiting or running) and time.monotonic() - begin < seconds:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < width:
            running.append(subprocess.Popen([*command, waiting.pop(0)], cwd=ROOT))
        time.sleep(0.1)
    for process in running:
        process.kill()
        process.wait()
    return time.monotonic() - begin


def main(scheme: str) -> None:
    """Call every kernel of `scheme` once."""
    for case in CASES:
        made = make_products(case, scheme, torch.device("cuda"), FEW, 0, rehearse=False)
        hidden, cells = made.inputs(1)
        made.decode(hidden, torch.zeros(len(cells), dtype=torch.int32, device="cuda"), cells)
        hidden, cells = made.inputs(PROMPT)
        made.prefill(hidden, made.batch(PROMPT, FEW), cells)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
