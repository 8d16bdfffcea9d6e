"""Tokens a second before there is a model, by a formula that a reader can check by hand.

The seconds of one generated token follow from the bytes that it moves and the kernels that it
starts. A model has L MoE layers of E experts, of which a token uses k. An expert has R bytes, the
dense weights that a token reads have D bytes, and S experts over all layers are resident.

    hits    = ((S/L - k/4) / (E - k/4)) ** exponent    share of the L*k choices; 1 if S = L*E
    misses  = L * k * (1 - hits)
    copies  = misses * (latency + R / link rate)
              + misses from disk * (disk latency + R / disk rate)
    memory  = (D + L * k * R) / memory rate            every weight is read once
    starts  = L * KERNEL_STARTS                        if steps are planned on the card, else 0
    Python  = L * (LAYER + k * LAUNCHES * launch)      if steps are planned by the host, else 0
              + L * GUESS                              if there are misses
    waits   = (1 - recall) * copies
    seconds = max(copies, memory + starts + waits, Python)     on a GPU
              copies + memory + Python                         on a CPU, which does all of them

Everything is in bytes and seconds. Rates, latencies and `launch` are those of a `Hardware`, where
the link is at most as fast as RAM; `exponent` and `recall` are those of a `Locality`. A GPU waits
for the share of the copies that was not guessed one layer ahead; the others are made while it is
busy. Copies of wrong guesses are not counted.

The hit rate follows from how routers choose, which no config tells. If experts are ranked by how
often they are chosen and these frequencies fall like rank ** (exponent - 1), then the share s that
is chosen most often gets s ** exponent of the choices. The k/4 stand for slots that hold what the
layer at work needs and that serve no later token. The exponents lie around the hit rates of
simulated caches (docs/log/simulator.md) and published ones: Mixtral-8x7B 40% with 2 of 8 experts a
layer resident and 60% with 4 (arXiv 2312.17238, figure 2); Qwen3-30B-A3B 66% with 13% resident
(tinyserve), and 37, 74, 89 and 96% with 5, 15, 30 and 50% (imp).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from offload.cache.decision import Decision
from offload.cache.sharded import Cache
from offload.cache.trace.replay import Setup, replay
from offload.cache.trace.trace import Event, Trace
from offload.machine.hardware import Hardware


@dataclass(frozen=True)
class Locality:
    """How well a router's choices can be cached and guessed."""

    exponent: float  # 1: all experts are chosen alike; the nearer to 0, the more few are favoured
    recall: float  # share of a layer's choices that are guessed; 0.8 to 0.9 in arXiv 2312.17238


UNIFORM, USUAL, LOCAL = Locality(1.0, 0.8), Locality(0.5, 0.85), Locality(0.1, 0.9)
LAYER = 14e-3 / 30  # transformers' Python around the products of 30 layers takes 14 ms a token
GUESS = 150e-6  # asking the next router and planning its loads takes 0.1 to 0.2 ms
LAUNCHES = 4  # kernels of an expert: two products, the activation, the sum
# A token that is one CUDA graph starts about ten kernels a layer, each in 2 microseconds. With
# these the forecast for Qwen3-30B-A3B, all resident on an RTX 4090, is 199 tokens/s; 196 were
# published.
KERNEL_STARTS = 10 * 2e-6
RATES = 0.75  # at the low end: share of the rates that is left by other programs and slots
SLOW_PYTHON = 1.5  # at the low end: times the seconds above, measured on one processor
# At the low end: products on a CPU reach half of its memory's rate at 2 bits, all of it at 6.
CPU_PASSES = 1.5
TRACE_TOKENS = 200  # generated tokens of a trace that are replayed


@dataclass(frozen=True)
class Workload:
    """A model on a machine, as far as bytes and launches are concerned."""

    layers: int  # MoE layers
    experts: int  # over all layers
    top_k: int
    expert_bytes: int  # of one expert
    dense_bytes: int  # weights that every token reads: attention, shared experts, head
    slots: int  # over all layers and cards
    hardware: Hardware
    disk_share: float = 0.0  # share of the misses that RAM does not hold
    on_device: bool = False  # steps are planned on the card, and a token is one CUDA graph


@dataclass(frozen=True)
class Forecast:
    """Decoding one sequence: `usual` tokens a second, and the range from `low` to `high`."""

    low: float
    usual: float
    high: float
    loaded_bytes: float  # a token, at `usual`
    limited_by: str  # the longest part at `usual`: link, VRAM, RAM, disk, Python or launch


def forecast(work: Workload, trace: Trace | None = None) -> Forecast:
    """Tokens a second of `work`, with the hit rate of `trace` if one of the same model is given.

    The low end of the range stands for `UNIFORM` routing, `RATES`, `SLOW_PYTHON` and a host that
    plans, on a CPU also `CPU_PASSES`; its high end for `LOCAL` routing, on a CPU also 1 / `RATES`.
    """
    if trace is None:
        share, experts = work.slots / work.experts, work.experts / work.layers
        routings = (UNIFORM, USUAL, LOCAL)
        hits = [hit_rate(share, experts, work.top_k, routing) for routing in routings]
    else:
        hits = [replayed_hit_rate(trace, work.slots)] * 3
    gpu = work.hardware.runs_ahead
    slow = replace(work, hardware=at_share(work.hardware, RATES), on_device=False)
    # A CPU may have been busy when it was measured; the published rates of cards are the best.
    quick = work if gpu else replace(work, hardware=at_share(work.hardware, 1 / RATES))
    low = _Seconds.of(slow, hits[0], passes=1.0 if gpu else CPU_PASSES, python=SLOW_PYTHON)
    usual, high = _Seconds.of(work, hits[1]), _Seconds.of(quick, hits[2])
    return Forecast(
        1 / low.total(UNIFORM.recall, gpu),
        1 / usual.total(USUAL.recall, gpu),
        1 / high.total(LOCAL.recall, gpu),
        work.layers * work.top_k * (1 - hits[1]) * work.expert_bytes,
        usual.limit(gpu),
    )


def hit_rate(share: float, experts: float, top_k: int, locality: Locality) -> float:
    """Share of the choices whose expert is resident, when a share of all experts is.

    `experts`: of a layer.
    """
    if share >= 1:
        return 1.0
    resident = (share * experts - top_k / 4) / (experts - top_k / 4)
    return math.pow(max(0.0, resident), locality.exponent)


def replayed_hit_rate(trace: Trace, slots: int) -> float:
    """Hit rate of generated tokens when the beginning of `trace` is replayed with `slots`."""
    requests = hits = tokens = 0

    def count(_: Cache, event: Event, decision: Decision) -> None:
        nonlocal requests, hits
        if not event.prompt:
            requests += len(event.distinct())
            hits += sum(len(wave.hits) for wave in decision.waves)

    events = []
    for event in trace.events:
        tokens += event.layer == 0 and not event.prompt
        if tokens > TRACE_TOKENS:
            break
        events.append(event)
    replay(Trace(trace.header, events), Setup(slots, "lfru"), count)
    return hits / requests if requests else 0.0


def at_share(hardware: Hardware, share: float) -> Hardware:
    """`hardware` with a share of its rates."""
    return replace(
        hardware,
        memory_gb_per_s=hardware.memory_gb_per_s * share,
        link_gb_per_s=hardware.link_gb_per_s * share,
        ram_gb_per_s=hardware.ram_gb_per_s * share,
        disk_gb_per_s=hardware.disk_gb_per_s * share,
    )


@dataclass(frozen=True)
class _Seconds:
    """The parts of a token's time, as the formula above has them."""

    memory: float
    starts: float
    python: float
    from_ram: float  # copies of experts that RAM holds
    from_disk: float  # copies of the others

    @classmethod
    def of(
        cls, work: Workload, hits: float, *, passes: float = 1.0, python: float = 1.0
    ) -> _Seconds:
        """`passes`: times that weights are read; `python`: times the usual seconds of Python."""
        layers, k, machine = work.layers, work.top_k, work.hardware
        misses = layers * k * (1 - hits)
        bytes_read = work.dense_bytes + layers * k * work.expert_bytes
        host = LAYER + k * LAUNCHES * machine.launch_seconds + (GUESS if misses else 0.0)
        ram, disk = (
            machine.copy_seconds(work.expert_bytes, from_disk=there) for there in (False, True)
        )
        return cls(
            memory=passes * bytes_read / (machine.memory_gb_per_s * 1e9),
            starts=layers * KERNEL_STARTS if work.on_device else 0.0,
            python=0.0 if work.on_device else python * layers * host,
            from_ram=misses * (1 - work.disk_share) * ram,
            from_disk=misses * work.disk_share * disk,
        )

    def total(self, recall: float, gpu: bool) -> float:
        """Seconds of a token when a share `recall` of the copies is begun ahead of time."""
        copies = self.from_ram + self.from_disk
        if not gpu:
            return copies + self.memory + self.python
        return max(copies, self.memory + self.starts + (1 - recall) * copies, self.python)

    def limit(self, gpu: bool) -> str:
        """The name of the longest part; on a CPU copies from RAM go over its memory too."""
        if gpu:
            copies = "disk" if self.from_disk > self.from_ram else "link"
            parts = {copies: self.from_ram + self.from_disk, "VRAM": self.memory}
        else:
            parts = {"disk": self.from_disk, "RAM": self.from_ram + self.memory}
        parts |= {"Python": self.python, "launch": self.starts}
        return max(parts, key=parts.__getitem__)
