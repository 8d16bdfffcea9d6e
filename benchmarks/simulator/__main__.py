"""Simulate a routing trace on a machine, from what a user types to lines.

python -m benchmarks.simulator chat.trace --hardware "RTX 4090" --expert-slots 25%
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.simulator.outcome import SimulatedRun
from benchmarks.simulator.simulator import SOFTWARE, Scenario, simulate
from benchmarks.simulator.timeline import Timeline
from offload import files
from offload.cache.trace.replay import Setup
from offload.cache.trace.trace import CacheError, Trace
from offload.machine.hardware import PROFILES, Hardware, find_hardware
from offload.quant.errors import OffloadError
from offload.trace.show import open_trace
from offload.units import parse_bytes, parse_slots

HERE = "here"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.simulator",
        description="simulate tokens/second on a machine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("trace", metavar="FILE", help="what --trace recorded, or synthetic:MODEL")
    add("--expert-slots", default="25%", metavar="N", help="resident experts, a number or a share")
    add("--policy", default="lfru", metavar="NAME", help="which expert is evicted")
    add(
        "--hardware",
        default=HERE,
        metavar="NAME",
        help=f"a card, like 3060, 4090, 2x4090, a100; {HERE} measures this machine",
    )
    add("--software", default="host-planned", metavar="NAME", help=" or ".join(SOFTWARE))
    add(
        "--lookahead",
        default="router",
        metavar="NAME",
        help="who guesses the next experts: none, live (as recorded) or router",
    )
    add("--dense", metavar="SIZE", help="dense weights that a token reads, if not the trace's")
    add("--ram", metavar="SIZE", help="RAM for experts, if not all are in RAM; the rest is on disk")
    add("--timeline", type=Path, metavar="FILE", help="write a JSON file for ui.perfetto.dev")
    add("--debug", action="store_true", help="show a traceback when something fails")
    return parser


def answer(arguments: argparse.Namespace) -> list[str]:
    """The lines to print. Raises `OffloadError`, also for what the cache finds wrong."""
    file: Path | None = arguments.timeline
    try:
        files.check_output(file, files.TIMELINE)
        trace, machine = open_trace(arguments.trace), find_machine(arguments.hardware)
        scenario = make_scenario(arguments, trace, machine)
        timeline = Timeline(f"{trace.header.model} on {machine.name}") if file else None
        run = simulate(trace, scenario, timeline)
        if file is not None and timeline is not None:
            timeline.write(file)
    except CacheError as error:
        raise OffloadError(str(error)) from None
    except OSError as error:
        raise OffloadError(
            f"cannot write the timeline to {file} ({error.strerror}): name another --timeline"
        ) from None
    return describe(trace, scenario, run)


def find_machine(name: str) -> Hardware:
    """The profile called `name`; "here" is this machine, measured."""
    if name.casefold() == HERE:
        from offload.machine.measure import measure

        return measure()
    found = find_hardware(name)
    if found is None:
        raise OffloadError(
            f"there is no profile of {name!r}: choose {', '.join(PROFILES)}, or {HERE} to measure "
            "this machine"
        )
    return found


def measured_tflops() -> float:
    """What this machine's GPU, or else its CPU, reaches on a product of bfloat16 matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    seconds = min(_product_seconds(one) for _ in range(3))
    return 2 * one.numel() * 512 / seconds / 1e12


def _product_seconds(matrix: torch.Tensor) -> float:
    rows = matrix[:512]
    begin = time.perf_counter()
    (rows @ matrix).sum().item()  # sync: the product ends before the clock is read
    return time.perf_counter() - begin


def make_scenario(arguments: argparse.Namespace, trace: Trace, machine: Hardware) -> Scenario:
    """What was typed, as numbers."""
    slots = parse_slots(arguments.expert_slots, trace.header.total_experts)
    assert slots is not None
    settings = trace.header.settings
    dense = parse_bytes(arguments.dense)
    if dense is None:
        said = settings.get("dense_bytes")
        if not isinstance(said, int | float):
            raise OffloadError(
                "the trace does not say how many bytes of dense weights a token reads: give them, "
                "like --dense 3GiB"
            )
        dense = int(said)
    software = SOFTWARE.get(arguments.software)
    if software is None:
        raise OffloadError(f"there is no software {arguments.software!r}: {' or '.join(SOFTWARE)}")
    slots = min(slots, trace.header.total_experts)
    cache = Setup(slots, arguments.policy, arguments.lookahead)
    ram = parse_bytes(arguments.ram)
    tflops = measured_tflops() if arguments.hardware.casefold() == HERE else None
    scenario = Scenario(machine, cache, dense, software, ram_bytes=ram, tflops=tflops)
    bits = settings.get("expert_bits")
    return replace(scenario, expert_bits=float(bits)) if isinstance(bits, int | float) else scenario


def describe(trace: Trace, scenario: Scenario, run: SimulatedRun) -> list[str]:
    """What was simulated, then what was found."""
    machine = scenario.hardware
    cards = f"{machine.cards} cards, each " if machine.cards > 1 else ""
    return [
        f"{trace.header.model}, {trace.tokens} tokens, on {machine.name}: {cards}memory "
        f"{machine.memory_gb_per_s:.0f} GB/s, link {machine.link_gb_per_s:.1f} GB/s",
        *run.lines(),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answer; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        print("\n".join(answer(arguments)))
    except OffloadError as error:
        if arguments.debug:
            raise
        print(f"simulator: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
