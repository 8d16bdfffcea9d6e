"""The speeds that `offload plan` forecasts beside simulated ones.

The simulator runs three made-up routings with the real cache. They correspond to the localities of
`offload.plan.forecast`: no routing has less locality than `UNIFORM`, and most hit rates that were
published lie between it and `LOCAL`.

    python -m benchmarks.simulator.compare
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.simulator.simulator import (
    DEVICE_PLANNED,
    HOST_PLANNED,
    Scenario,
    Software,
    simulate,
)
from offload.cache.trace.replay import Setup
from offload.cache.trace.synthetic import MIXTRAL, QWEN3_30B, Routing, Shape, synthesize
from offload.cache.trace.trace import Event, Trace
from offload.machine.hardware import Hardware, find_hardware
from offload.plan.forecast import RATES, SLOW_PYTHON, Forecast, Workload, at_share, forecast

UNIFORM = Routing(stickiness=0.0, skew=0.0, recall=0.8)
USUAL = Routing(stickiness=0.3, skew=0.5, recall=0.85)
LOCAL = Routing(stickiness=0.6, skew=1.2, recall=0.9)  # recall: 80-90% in arXiv 2312.17238
WARM_TOKENS, TOKENS = 48, 32  # tokens before those that are counted, and tokens that are counted
# MXFP4: 4 bits and an 8-bit scale for 32 weights. Dense: 20.91 B weights less experts and table.
GPT_OSS_20B = Shape("gpt-oss-20b", 24, 32, 4, 3 * 2880 * 2880 * 17 // 32, 2_450_652_288, 4.25)
MODELS = (MIXTRAL, QWEN3_30B, GPT_OSS_20B)
MACHINES = ("RTX 3060", "RTX 4090", "2x4090")
SHARES = (0.10, 0.25, 0.50, 1.00)


def workload(shape: Shape, hardware: Hardware, share: float) -> Workload:
    """`shape` on `hardware` with a share of its experts resident, planned where `load` plans it."""
    experts = shape.layers * shape.experts
    return Workload(
        shape.layers,
        experts,
        shape.top_k,
        shape.record_bytes,
        shape.dense_bytes,
        round(share * experts),
        hardware,
        on_device=hardware.cards == 1,
    )


def simulated(shape: Shape, work: Workload) -> tuple[float, float, float]:
    """Simulated tokens a second at the low end, as usual, and at the high end."""
    slow = replace(
        HOST_PLANNED, host_seconds_per_layer=HOST_PLANNED.host_seconds_per_layer * SLOW_PYTHON
    )
    software = DEVICE_PLANNED if work.on_device else HOST_PLANNED
    return (
        _tokens_per_s(shape, work, at_share(work.hardware, RATES), UNIFORM, slow),
        _tokens_per_s(shape, work, work.hardware, USUAL, software),
        _tokens_per_s(shape, work, work.hardware, LOCAL, software),
    )


def _tokens_per_s(
    shape: Shape, work: Workload, hardware: Hardware, routing: Routing, software: Software
) -> float:
    scenario = Scenario(
        hardware,
        Setup(work.slots, "lfru", "router"),
        shape.dense_bytes,
        software,
        expert_bits=shape.expert_bits,
    )
    return simulate(_warm_trace(shape, routing), scenario).decode.tokens_per_s


def _warm_trace(shape: Shape, routing: Routing) -> Trace:
    """A run whose first tokens count as a prompt, so that slots are full when decoding begins."""
    trace = synthesize(shape, routing, WARM_TOKENS + TOKENS)
    every = tuple((expert,) for expert in range(shape.experts))
    filling = [Event(layer, True, every) for layer in range(shape.layers)]
    warming = WARM_TOKENS * shape.layers
    events = [event._replace(prompt=at < warming) for at, event in enumerate(trace.events)]
    return Trace(trace.header, [*filling, *events])


def rows() -> Iterator[tuple[str, str, float, Forecast, tuple[float, float, float]]]:
    """Model, machine, share of resident experts, forecast and simulated tokens a second."""
    for shape in MODELS:
        for name in MACHINES:
            for share in SHARES:
                machine = find_hardware(name)
                assert machine is not None
                work = workload(shape, machine, share)
                yield shape.name, name, share, forecast(work), simulated(shape, work)


def main() -> None:
    """Print a table."""
    names = "model machine resident forecast range simulated range ratio inside"
    print(f"| {names.replace(' ', ' | ')} |\n| --- | --- |{' ---: |' * 6} --- |")
    for model, machine, share, told, (low, usual, high) in rows():
        inside = told.low <= usual * 1.005 and usual <= told.high * 1.005
        cells = [model, machine, f"{share:.0%}", f"{told.usual:.1f}"]
        cells += [f"{told.low:.1f}-{told.high:.1f}", f"{usual:.1f}", f"{low:.1f}-{high:.1f}"]
        cells += [f"{told.usual / usual:.2f}", "yes" if inside else "no"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
