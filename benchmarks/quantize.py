"""Measures how fast, and in how much memory, checkpoints are quantised on one core and on all.

Makes random checkpoints with the shapes of real models (one layer, few experts), quantises each in
a process of its own, and watches the memory of that process and its children. Prints a table, then
writes JSON.

    python benchmarks/quantize.py [--experts 4] [--bits q4] [--output benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import machine
from transformers import MixtralConfig, MixtralForCausalLM

SHAPES = {  # hidden, inner
    "Mixtral-8x22B": (6144, 16384),
    "Mixtral-8x7B": (4096, 14336),
    "Qwen3-30B-A3B": (2048, 768),
}
MAKE = """
import sys
from pathlib import Path
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
find_or_make_pack(sys.argv[1], LoadOptions(bits=sys.argv[2]), destination=Path(sys.argv[3]))
"""


def write_checkpoint(folder: Path, hidden: int, inner: int, experts: int) -> None:
    """A random Mixtral of one layer in bfloat16."""
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_local_experts=experts,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        vocab_size=512,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def memory(process: psutil.Process) -> int:
    """The bytes of memory that a process and its children have and that no file backs."""
    total = 0
    for each in (process, *process.children()):
        status = Path(f"/proc/{each.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        total += int(line.split()[1]) * 1024
    return total


def make(checkpoint: Path, bits: str, pack: Path, cores: int) -> dict[str, Any]:
    """Quantise on `cores` cores; the rate is read from the command's last line on stderr."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(checkpoint), bits, str(pack)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )
    peak = 0
    while child.poll() is None:
        try:
            peak = max(peak, memory(psutil.Process(child.pid)))
        except (psutil.NoSuchProcess, OSError, StopIteration):
            continue
        time.sleep(0.02)
    assert child.stderr is not None
    lines = child.stderr.read().splitlines()
    if child.returncode:
        raise SystemExit("\n".join(lines))
    rate = next(float(line.split(", ")[1].split()[0]) for line in lines if "done in" in line)
    return {
        "cores": cores,
        "million_weights_per_second": rate,
        "wall_seconds": time.perf_counter() - begin,
        "peak_bytes": peak,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--bits", default="q4")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    head = "shape | experts | layer GiB (bf16) | cores | M weights/s | peak memory GiB"
    print(f"| {head} |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.shapes:
        hidden, inner = SHAPES[name]
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            write_checkpoint(checkpoint, hidden, inner, arguments.experts)
            layer = arguments.experts * 3 * hidden * inner * 2
            for cores in sorted({1, len(os.sched_getaffinity(0))}):
                row = make(checkpoint, arguments.bits, Path(scratch) / f"pack-{cores}", cores)
                what = {"shape": name, "experts": arguments.experts, "layer_bytes": layer}
                rows.append({**what, **row})
                rate, peak = row["million_weights_per_second"], row["peak_bytes"] / 2**30
                sizes = f"{arguments.experts} | {layer / 2**30:.2f} | {cores}"
                print(f"| {name} | {sizes} | {rate:.1f} | {peak:.2f} |", flush=True)
    if arguments.output:
        report = {**machine(), "bits": arguments.bits, "results": rows}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
