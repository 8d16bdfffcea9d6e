"""Tokens a second before there is a model: a guess with a range, and what limits it.

Knows: which routing and which software a guess and its range stand for. Does not know: bits, files,
budgets; time is simulated by `cache.simulator`.

How often an expert is already resident follows from how routers choose, which no config tells. So
three routings are stated: none has less locality than `UNIFORM`, and the hit rates published for
Mixtral-8x7B (arXiv 2312.17238: LRU about 40% with 2 of 8 experts a layer resident, 60% with 4) and
Qwen3-30B-A3B (tinyserve: LRU 66% at 13%; imp: 37/74/89% at 5/15/30%) lie between it and `LOCAL`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload.cache.simulate.machines import DEVICE_PLANNED, HOST_PLANNED, Hardware, Software
from offload.cache.simulate.simulator import Scenario, simulate
from offload.cache.trace.replay import Setup
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.cache.trace.trace import Event, Trace

UNIFORM = Routing(stickiness=0.0, skew=0.0, recall=0.8)
USUAL = Routing(stickiness=0.3, skew=0.5, recall=0.85)
LOCAL = Routing(stickiness=0.6, skew=1.2, recall=0.9)  # recall: 80-90% (arXiv 2312.17238)
WARM_TOKENS, TOKENS = 48, 32  # before what is counted, and counted
# Layers are alike, so a few stand for all; more of them where RAM holds only some.
FEW_LAYERS, MORE_LAYERS = 4, 8
TRACE_TOKENS = 200  # of a recorded run
RATES = 0.75  # of the stated ones, at the low end: other slots, lanes and programs take their part
HOST = 1.5  # times the Python, at the low end: it was measured on one processor
# A CPU's products reach half of its memory's rate at 2 bits, nearly all of it at 6 (docs/log.md).
SLOW_PRODUCTS = 1.5  # passes over memory, at the low end
LIMITS = {
    "the link": "link",
    "the disk": "disk",
    "the host": "Python",
    "kernel starts": "launch",
}


@dataclass(frozen=True)
class Load:
    """A model on a machine, as far as time is concerned."""

    shape: Shape
    hardware: Hardware
    slots: int  # over all cards
    # What RAM holds of the experts; None: all. Its share of all is its share of what is loaded:
    # experts that have a slot too take their part of it (docs/log.md).
    ram_bytes: int | None = None
    policy: str = "lfru"
    on_device: bool = False  # steps are planned on the card, a token is one CUDA graph

    @property
    def engine(self) -> Software:
        """What serves it."""
        return DEVICE_PLANNED if self.on_device else HOST_PLANNED


@dataclass(frozen=True)
class Forecast:
    """Decoding one sequence: `usual` tokens a second, and between which others it may be."""

    low: float
    usual: float
    high: float
    loaded_bytes: float  # a token, at `usual`
    limited_by: str  # link, VRAM, RAM, disk, Python or launch (of kernels), at `usual`


def forecast(load: Load) -> Forecast:
    """What the stated routings make of `load`. Raises `CacheError`."""
    return _forecast(
        _run_few_layers(replace(load, hardware=_at(load.hardware, RATES)), UNIFORM, _slow(load)),
        _run_few_layers(load, USUAL, load.engine),
        _run_few_layers(_at_best(load), LOCAL, load.engine),
        load.hardware,
    )


def forecast_of(load: Load, trace: Trace) -> Forecast:
    """What a recorded run of the same model makes of `load`; the range is the software's.

    Raises `CacheError`, also for a trace of another model.
    """
    cut = _beginning(trace)
    return _forecast(
        _run(replace(load, hardware=_at(load.hardware, RATES)), cut, _slow(load), "none"),
        _run(load, cut, load.engine, "router"),
        _run(_at_best(load), cut, load.engine, "router"),
        load.hardware,
    )


@dataclass(frozen=True)
class _Speed:
    tokens_per_s: float
    loaded_bytes: float
    limited_by: str


def _forecast(low: _Speed, usual: _Speed, high: _Speed, hardware: Hardware) -> Forecast:
    memory = "VRAM" if hardware.runs_ahead else "RAM"
    limit = LIMITS.get(usual.limited_by, memory)
    if limit == "link" and not hardware.runs_ahead:  # RAM to RAM
        limit = memory
    speeds = sorted(speed.tokens_per_s for speed in (low, usual, high))
    return Forecast(speeds[0], speeds[1], speeds[2], usual.loaded_bytes, limit)


def _at(hardware: Hardware, share: float) -> Hardware:
    """`hardware` with a share of its rates."""
    return replace(
        hardware,
        memory_gb_per_s=hardware.memory_gb_per_s * share,
        link_gb_per_s=hardware.link_gb_per_s * share,
        ram_gb_per_s=hardware.ram_gb_per_s * share,
        disk_gb_per_s=hardware.disk_gb_per_s * share,
    )


def _at_best(load: Load) -> Load:
    """A processor may have been busy when it was measured; profiles of cards are the best."""
    machine = load.hardware
    return load if machine.runs_ahead else replace(load, hardware=_at(machine, 1 / RATES))


def _slow(load: Load) -> Software:
    """The slowest that may serve this machine: memory that cannot be pinned, say, leaves the
    planning to the host."""
    passes = 1.0 if load.hardware.runs_ahead else SLOW_PRODUCTS
    seconds = HOST_PLANNED.host_seconds_per_layer * HOST
    return replace(HOST_PLANNED, memory_passes=passes, host_seconds_per_layer=seconds)


def _beginning(trace: Trace) -> Trace:
    """`trace` up to `TRACE_TOKENS` that were generated."""
    events, tokens = [], 0
    for event in trace.events:
        tokens += event.layer == 0 and not event.prompt
        if tokens > TRACE_TOKENS:
            break
        events.append(event)
    return Trace(trace.header, events)


def _run_few_layers(load: Load, routing: Routing, software: Software) -> _Speed:
    """The time of a few layers, as much longer as there are more."""
    whole = load.shape.layers
    fits = load.ram_bytes is None or load.ram_bytes >= whole * load.shape.layer_bytes
    layers = min(whole, max(FEW_LAYERS if fits else MORE_LAYERS, 2 * load.hardware.cards))
    part = layers / whole
    shape = replace(load.shape, layers=layers, dense_bytes=round(load.shape.dense_bytes * part))
    few = replace(
        load,
        shape=shape,
        slots=max(load.hardware.cards, round(load.slots * part)),
        ram_bytes=None if load.ram_bytes is None else round(load.ram_bytes * part),
    )
    a_token = replace(software, host_seconds_per_token=software.host_seconds_per_token * part)
    speed = _run(few, _warm_trace(shape, routing), a_token, "router")
    return replace(
        speed,
        tokens_per_s=speed.tokens_per_s * part,
        loaded_bytes=speed.loaded_bytes / part,
    )


def _warm_trace(shape: Shape, routing: Routing) -> Trace:
    """A run whose first tokens are no part of the decoding: slots are full when that begins."""
    trace = synthesize(shape, routing, WARM_TOKENS + TOKENS)
    every = tuple((expert,) for expert in range(shape.experts))
    filling = [Event(layer, True, every) for layer in range(shape.layers)]
    warming = WARM_TOKENS * shape.layers
    events = [event._replace(prompt=at < warming) for at, event in enumerate(trace.events)]
    return Trace(trace.header, [*filling, *events])


def _run(load: Load, trace: Trace, software: Software, lookahead: str) -> _Speed:
    scenario = Scenario(
        load.hardware,
        Setup(load.slots, load.policy, lookahead),
        load.shape.dense_bytes,
        software,
        expert_bits=load.shape.expert_bits,
        ram_bytes=load.ram_bytes,
    )
    decode = simulate(trace, scenario).decode
    loaded = decode.loaded_bytes / decode.tokens if decode.tokens else 0.0
    return _Speed(decode.tokens_per_s, loaded, decode.limited_by)
