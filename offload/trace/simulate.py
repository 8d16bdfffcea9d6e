"""`offload trace simulate`: from what a user types to a prediction as lines.

Knows: names of machines and models, files, flags' texts. Does not know: how time is simulated
(`cache.simulator`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from offload.cache.errors import CacheError
from offload.cache.simulate.machines import PROFILES, SOFTWARE, Hardware, find_hardware
from offload.cache.simulate.prediction import Prediction
from offload.cache.simulate.simulator import Scenario, simulate
from offload.cache.trace.replay import Setup
from offload.cache.trace.timeline import Timeline
from offload.cache.trace.trace import Trace
from offload.quant.errors import OffloadError
from offload.trace.show import open_trace

HERE = "here"


@dataclass(frozen=True)
class Question:
    """What is asked, as the command line has it."""

    trace: str  # a file, or synthetic:MODEL
    hardware: str
    expert_slots: str = "25%"
    policy: str = "lfru"
    software: str = "host-planned"
    lookahead: str = "router"
    dense: str | None = None  # size; None: what the trace says
    ram: str | None = None
    timeline: Path | None = None


def answer(question: Question) -> list[str]:
    """The prediction's lines. Raises `OffloadError`, also for what `cache` finds wrong."""
    from offload.trace.timeline import check_writable, write

    file = question.timeline
    try:
        trace, machine = open_trace(question.trace), find_machine(question.hardware)
        scenario = make_scenario(question, trace, machine)
        if file is None:
            return describe(trace, scenario, simulate(trace, scenario))
        check_writable(file)
        timeline = Timeline(f"{trace.header.model} on {machine.name}")
        prediction = simulate(trace, scenario, timeline)
    except CacheError as error:
        raise OffloadError(str(error)) from None
    write(timeline, file)
    return describe(trace, scenario, prediction)


def find_machine(name: str) -> Hardware:
    """A profile by name; `here` is measured."""
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


def make_scenario(question: Question, trace: Trace, machine: Hardware) -> Scenario:
    """Texts as numbers."""
    from offload.units import parse_bytes, parse_slots

    slots = parse_slots(question.expert_slots, trace.header.total_experts)
    assert slots is not None
    settings = trace.header.settings
    dense = parse_bytes(question.dense)
    if dense is None:
        said = settings.get("dense_bytes")
        if not isinstance(said, int | float):
            raise OffloadError(
                "the trace does not say how many bytes of dense weights a token reads: give them, "
                "like --dense 3GiB"
            )
        dense = int(said)
    software = SOFTWARE.get(question.software)
    if software is None:
        raise OffloadError(f"there is no software {question.software!r}: {' or '.join(SOFTWARE)}")
    cache = Setup(
        min(slots, trace.header.total_experts),
        question.policy,
        question.lookahead,
    )
    scenario = Scenario(machine, cache, dense, software, ram_bytes=parse_bytes(question.ram))
    bits = settings.get("expert_bits")
    return replace(scenario, expert_bits=float(bits)) if isinstance(bits, int | float) else scenario


def describe(trace: Trace, scenario: Scenario, prediction: Prediction) -> list[str]:
    """What was simulated, then what was found."""
    machine = scenario.hardware
    cards = f"{machine.cards} cards, each " if machine.cards > 1 else ""
    return [
        f"{trace.header.model}, {trace.tokens} tokens, on {machine.name}: {cards}memory "
        f"{machine.memory_gb_per_s:.0f} GB/s, link {machine.link_gb_per_s:.1f} GB/s",
        *prediction.lines(),
    ]
