"""Measures products of one to four tokens with packed weights beside torch's bfloat16 `linear`.

Each product takes the next of many equal matrices, as decoding does, so that weights come from
memory. `linear` means the quicker one of oneDNN and torch's own kernel. All ways take turns, and a
ratio is the median of the rounds' ratios. Prints a table, then writes JSON with the hardware.

    python benchmarks/matmul.py [--rounds 9] [--shapes demo,qwen3] [--output FILE]

On a busy machine, `--threads 1 --processor-time` counts only the time of this program's thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import torch
from machine import RESULTS, machine
from torch import Tensor
from torch.nn.functional import linear

from offload.quant.kernels.compiler import this_processor
from offload.quant.matmul import matmul, sample_matrix
from offload.quant.record import MatrixView
from offload.quant.scheme import Scheme

SHAPES = {  # N x K
    "demo gate_up": (3072, 576),
    "demo down": (576, 1536),
    "qwen3-30b gate_up": (2048, 768),
    "qwen3-30b down": (768, 2048),
    "mixtral gate or up": (14336, 4096),
    "mixtral down": (4096, 14336),
}
BITS = (2, 3, 4, 5, 6, 8)
TOKENS = (1, 4)
RING_BYTES = 96 * 2**20  # of the matrices that take turns; more than a core's own caches hold

Clock = Callable[[], float]


def bandwidths(clock: Clock) -> tuple[float, float]:
    """GB/s of a large copy, in which each byte is counted once, and of a large read."""
    source = torch.ones(2**26)  # 256 MiB
    target = torch.empty_like(source)
    copies, reads = [], []
    for _ in range(7):
        begin = clock()
        target.copy_(source)
        middle = clock()
        source.sum()
        copies.append(middle - begin)
        reads.append(clock() - middle)
    return tuple(source.nbytes / min(seconds) / 1e9 for seconds in (copies, reads))


def own_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """The product by torch's own kernel instead of oneDNN."""
    before = torch.backends.mkldnn.set_flags(False)[0]
    out = linear(x, weight)
    torch.backends.mkldnn.set_flags(before)
    return out


def packed_bytes(view: MatrixView) -> int:
    """The bytes of a matrix that one product reads: codes, scales and steps."""
    parts = (view.weight, view.scales, view.steps)
    return sum(part.nbytes for part in parts if part is not None)


def copies_of(view: MatrixView) -> list[MatrixView]:
    """As many copies of the matrix as have `RING_BYTES` together."""
    assert view.scales is not None
    count = max(2, RING_BYTES // packed_bytes(view))
    return [
        MatrixView(view.layout, view.weight.clone(), view.scales.clone(), view.steps, None)
        for _ in range(count)
    ]


def measure(
    ways: dict[str, Callable[[int], Tensor]], repeats: int, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of one product, for each way and round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(-1, rounds):  # round -1 warms up
        for name, way in ways.items():
            times = []
            for turn in range(repeats):
                begin = clock()
                way(round_number * repeats + turn)
                times.append(clock() - begin)
            if round_number >= 0:
                seconds[name].append(statistics.median(times))
    return seconds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--shapes",
        default="",
        help="only shapes whose names begin with one of these, separated by commas",
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--scale-bits", type=int, default=16, choices=(8, 16))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "matmul-cpu.json")
    arguments = parser.parse_args()
    if arguments.processor_time and arguments.threads != 1:
        parser.error("--processor-time counts one thread: add --threads 1")
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.processor_time else time.perf_counter

    copied, read = bandwidths(clock)
    rows: list[dict[str, Any]] = []
    for name, (outputs, inputs) in SHAPES.items():
        if not name.startswith(tuple(arguments.shapes.split(","))):
            continue
        repeats = max(3, min(24, 2**28 // (outputs * inputs)))
        dense_count = max(2, RING_BYTES // (outputs * inputs * 2))
        dense = [torch.randn(outputs, inputs).bfloat16() for _ in range(dense_count)]
        scheme = {b: Scheme(b, arguments.group_size, arguments.scale_bits) for b in BITS}
        rings = {b: copies_of(sample_matrix(outputs, inputs, scheme[b])) for b in BITS}
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs).bfloat16()
            ways: dict[str, Callable[[int], Tensor]] = {
                "oneDNN": lambda turn, x=x, dense=dense: linear(x, dense[turn % len(dense)]),
                "torch": lambda turn, x=x, dense=dense: own_kernel(x, dense[~turn % len(dense)]),
            }
            for bits, ring in rings.items():
                ways[str(bits)] = lambda turn, x=x, ring=ring: matmul(x, ring[turn % len(ring)])
            seconds = measure(ways, repeats, arguments.rounds, clock)
            base = min(("oneDNN", "torch"), key=lambda way: statistics.median(seconds[way]))
            sizes = {str(bits): packed_bytes(ring[0]) for bits, ring in rings.items()}
            for way in (base, *sizes):
                taken = statistics.median(seconds[way])
                pairs = zip(seconds[base], seconds[way], strict=True)
                gb_per_s = sizes.get(way, dense[0].nbytes) / taken / 1e9
                rows.append(
                    {
                        "matrix": f"{name} {outputs} x {inputs}",
                        "tokens": tokens,
                        "bits": way if way in sizes else f"16 ({way})",
                        "median_us": taken * 1e6,
                        "speed_to_linear": statistics.median(a / b for a, b in pairs),
                        "gb_per_s": gb_per_s,
                        "of_copy": gb_per_s / copied,
                        "of_read": gb_per_s / read,
                        "samples_us": [second * 1e6 for second in seconds[way]],
                    }
                )
            print(f"{name}, {tokens} tokens: measured", flush=True)

    print(f"\ncopy {copied:.1f} GB/s, read {read:.1f} GB/s, {arguments.threads} threads\n")
    print("| N x K | tokens | bits | us | speed to linear | GB/s | of copy | of read |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['matrix']} | {row['tokens']} | {row['bits']} | {row['median_us']:.0f} "
            f"| {row['speed_to_linear']:.2f} | {row['gb_per_s']:.1f} "
            f"| {row['of_copy']:.0%} | {row['of_read']:.0%} |"
        )
    about = machine()
    about["hardware"] |= {
        "compiled_for": this_processor().name,
        "copy_gb_per_s": copied,
        "read_gb_per_s": read,
    }
    about["versions"]["llvmlite"] = llvmlite.__version__
    report = {
        **about,
        "clock": "processor time" if arguments.processor_time else "wall clock",
        "group_size": arguments.group_size,
        "scale_bits": arguments.scale_bits,
        "results": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
