"""A discrete-event model of decoding and prefill that turns a trace into simulated seconds.

The real cache makes every decision; the simulator knows what happens when in a step of the
host-planned engine. There are two clocks. The host runs the Python of a layer and plans the step;
the device runs what the host queued. Planning needs the router's answer, so both clocks meet there.
Copies have a clock of their own (`SimulatedLink`), one for each card. Cards hold a range of layers
each and work in turn.

A step, as in `offload.engine`: dense part, router, decision, urgent copies, guesses for the next
layer behind them, then each expert as soon as it is there, residents first.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from benchmarks.simulator.outcome import Phase, SimulatedRun
from benchmarks.simulator.timeline import Span, Timeline
from offload.cache.cache import ExpertCache
from offload.cache.decision import Use
from offload.cache.staging import Kept, Staging, absent, nearly_all
from offload.cache.statistics import LayerCounts
from offload.cache.trace.replay import Setup, admitted, card_trace, guesses, make_one, warmed
from offload.cache.trace.trace import CacheError, Event, Trace
from offload.machine.hardware import Hardware
from offload.plan.forecast import GUESS, KERNEL_STARTS, LAUNCHES, LAYER


@dataclass(frozen=True)
class Software:
    """What a runtime costs by itself."""

    name: str
    host_seconds_per_layer: float
    host_seconds_per_token: float = 0.0
    start_seconds_per_layer: float = 0.0  # of the device, between kernels that are queued already
    guess_seconds: float = 0.0
    launches_per_expert: int = LAUNCHES
    memory_passes: float = 1.0  # bytes through device memory for a byte of weights
    link_share: float = 1.0  # of the hardware's rate for pinned copies
    host_waits: bool = False  # whether the host waits for each copy too, not the device alone


# This project's engine where steps are planned by Python, with a sync for each layer.
HOST_PLANNED = Software("host-planned", LAYER, guess_seconds=GUESS)
# A whole-token CUDA graph: one launch a token (FreeToken, field figures), and on the host nothing
# for a layer. The device still starts its kernels one after the other.
DEVICE_PLANNED = Software(
    "device-planned",
    0.0,
    host_seconds_per_token=50e-6,
    start_seconds_per_layer=KERNEL_STARTS,
    launches_per_expert=0,
)
SOFTWARE = {software.name: software for software in (HOST_PLANNED, DEVICE_PLANNED)}


@dataclass(eq=False)
class Copy:
    """One copy; `begin` and `end` are known once the link has come to it."""

    seconds: float
    earliest: float  # moment before which it may not begin
    urgent: bool
    begin: float | None = None
    end: float | None = None


class SimulatedLink:
    """Copies one after the other in simulated seconds. Moments given to it never go back."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.busy_seconds = 0.0
        self.guess_delay_seconds = 0.0  # that urgent copies waited for the rest of a guess's copy
        self._under_way: Copy | None = None
        self._queues: tuple[deque[Copy], deque[Copy]] = (deque(), deque())  # urgent first

    def submit(self, now: float, seconds: float, *, urgent: bool, earliest: float = 0.0) -> Copy:
        """Queue a copy at `now` that may begin at `earliest` or later."""
        self.advance(now)
        copy = Copy(seconds, max(now, earliest), urgent)
        before = self._under_way
        if urgent and before is not None and not before.urgent:
            self.guess_delay_seconds += max(0.0, self.free_at - copy.earliest)
        self._queues[0 if urgent else 1].append(copy)
        return copy

    def advance(self, now: float) -> None:
        """Begin every copy whose turn comes before `now`."""
        while (copy := self._next()) is not None and max(self.free_at, copy.earliest) < now:
            self._begin(copy)

    def wait(self, now: float, copy: Copy) -> float:
        """The moment at which `copy` is complete if somebody waits for it from `now` on."""
        self.advance(now)
        if copy.end is None and not copy.urgent:  # as `offload.transfer` does
            self._queues[1].remove(copy)
            self._queues[0].append(copy)
            copy.urgent = True
        while copy.end is None:
            following = self._next()
            assert following is not None
            self._begin(following)
        return copy.end

    def drop(self, now: float, copy: Copy) -> bool:
        """Take a copy out of the queue, unless it has begun."""
        self.advance(now)
        if copy.begin is not None:
            return False
        self._queues[0 if copy.urgent else 1].remove(copy)
        return True

    def backlog(self, now: float) -> float:
        """Seconds of copying that are begun or queued at `now`."""
        self.advance(now)
        queued = sum(copy.seconds for queue in self._queues for copy in queue)
        return max(0.0, self.free_at - now) + queued

    def _next(self) -> Copy | None:
        for queue in self._queues:
            if queue:
                return queue[0]
        return None

    def _begin(self, copy: Copy) -> None:
        self._queues[0 if copy.urgent else 1].popleft()
        self._under_way = copy
        copy.begin = max(self.free_at, copy.earliest)
        self.free_at = copy.end = copy.begin + copy.seconds
        self.busy_seconds += copy.seconds


STAGING_ROWS = 2  # what large records have
# Dense FP16 tensor operations with FP32 accumulation, as NVIDIA publishes them.
TFLOPS = {
    "RTX 3060": 25.5,
    "RTX 3080": 59.5,
    "RTX 3080 Laptop": 38.0,
    "RTX 3090": 71.0,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5070 Ti": 87.9,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
    "T4": 65.0,
    "A100": 312.0,
}


@dataclass(frozen=True)
class Scenario:
    """Everything that a simulation needs beside the trace."""

    hardware: Hardware
    cache: Setup  # with the slots of all cards
    dense_bytes: float  # weights that each token reads beside the experts
    software: Software = HOST_PLANNED
    # Load guesses only as far as they end before the next urgent copy. This rule is the simulator's
    # own: the live engine queues every guess that the cache allows, as long as the link keeps up.
    gentle: bool = False
    expert_bits: float = 4.5  # stored for a weight; with `dense_bits` it sets a prompt's operations
    dense_bits: float = 16.0
    ram_bytes: int | None = None  # what RAM holds of the experts; None: all
    staging_rows: int = STAGING_ROWS
    early: bool = True  # begin a prompt's next layer before its router is asked
    tflops: float | None = (
        None  # limits the reading of a prompt; None: as `TFLOPS` says, or no limit
    )


def simulate(trace: Trace, scenario: Scenario, timeline: Timeline | None = None) -> SimulatedRun:
    """Replay `trace` in simulated time. Raises `CacheError` for a scenario that cannot be."""
    return _Simulation(trace, scenario, timeline).run()


@dataclass
class _Card:
    """One card's layers, slots and link."""

    number: int
    first: int  # layer
    cache: ExpertCache
    staging: Staging
    link: SimulatedLink = field(default_factory=SimulatedLink)
    copies: dict[int, Copy] = field(default_factory=dict)  # slot -> copy that none waited for yet
    released: dict[int, float] = field(default_factory=dict)  # slot -> end of its last use


class _Simulation:
    def __init__(self, trace: Trace, scenario: Scenario, timeline: Timeline | None) -> None:
        self.trace, self.header = trace, trace.header
        layers, cards, slots = self.header.layers, scenario.hardware.cards, scenario.cache.slots
        if not 0 < cards <= min(slots, layers):
            raise CacheError(
                f"{cards} cards need a layer and a slot each, not {layers} layers and {slots} "
                "slots: raise --expert-slots"
            )
        self.scenario, self.timeline = scenario, timeline
        self.hardware, self.software = scenario.hardware, scenario.software
        self.tflops = scenario.tflops or TFLOPS.get(self.hardware.name, math.inf)
        self.host = self.device = 0.0  # the two clocks
        self.phases = {False: Phase(), True: Phase()}  # by Event.prompt
        self.cards = [self._card(number) for number in range(cards)]
        self.card_of = [c.number for c in self.cards for _ in c.cache.statistics.layers]
        self.from_disk = [self._is_on_disk(layer) for layer in range(layers)]
        self.copy_seconds = [self._copy_seconds(layer) for layer in range(layers)]
        self.window = _Window()
        self.traced: list[tuple[Copy, Span]] = []

    def _card(self, number: int) -> _Card:
        cards, slots = self.hardware.cards, self.scenario.cache.slots
        first, end = (at * self.header.layers // cards for at in (number, number + 1))
        share = (number + 1) * slots // cards - number * slots // cards
        part = self.trace if cards == 1 else card_trace(self.trace, first, end)
        cache = make_one(part, replace(self.scenario.cache, slots=share, cards=()))
        return _Card(number, first, cache, Staging(cache.table.slots, self.scenario.staging_rows))

    def _is_on_disk(self, layer: int) -> bool:
        """Layers are taken into RAM in order, as far as it reaches."""
        sizes = zip(self.header.experts[: layer + 1], self.header.record_bytes, strict=False)
        held = self.scenario.ram_bytes
        return held is not None and sum(n * size for n, size in sizes) > held

    def _copy_seconds(self, layer: int) -> float:
        size = self.header.record_bytes[layer] / self.software.link_share
        return self.hardware.copy_seconds(round(size), from_disk=self.from_disk[layer])

    def run(self) -> SimulatedRun:
        for event in self.trace.events:
            self._step(event, self.phases[event.prompt])
        for copy, span in self.traced:
            if self.timeline is not None and copy.begin is not None:
                self.timeline.add(span._replace(begin=copy.begin))
        counts = (card.cache.statistics.total() for card in self.cards)
        return SimulatedRun(
            decode=self.phases[False],
            prefill=self.phases[True],
            links=len(self.cards),
            slots=self.scenario.cache.slots,
            total_experts=self.header.total_experts,
            counts=sum(counts, LayerCounts()),
            guess_delay_seconds=sum(card.link.guess_delay_seconds for card in self.cards),
        )

    def _step(self, event: Event, phase: Phase) -> None:
        card = self.cards[self.card_of[event.layer]]
        local = event.layer - card.first
        self._before(event, phase)
        self._dense(event, phase)
        self.window.planned(event, self.host)
        admit = admitted(event, self.scenario.cache, self.header)
        decision = card.cache.decide(local, event.distinct(), prompt=event.prompt, admit=admit)
        tokens_of = Counter(expert for row in event.experts for expert in row)
        steps = card.staging.steps(decision)
        right = sum(len(step.loads) - len(step.begin) for step in steps)
        card.cache.statistics.layers[local].early_loads_right += right
        early = admit is not None and self.scenario.early
        for step in steps:
            for use in step.begin:
                self._load(card, event.layer, use, phase, urgent=True)
            if step is steps[-1]:
                self._look_ahead(event, len(step.loads), phase)
                self._begin_early(event, early, phase, halves=1 if step.beside else 2)
            for use in (*step.hits, *step.loads):
                self._compute(card, event.layer, use, tokens_of[use.expert], phase)
            for kept in step.kept:
                self._keep(card, event.layer, kept, phase)
        self._begin_early(event, early, phase, halves=2)

    def _before(self, event: Event, phase: Phase) -> None:
        """Do what changed the residents since the last step: a restart, a warm start."""
        if event.fresh:
            for card in self.cards:
                card.cache.forget()
                for copy in card.copies.values():
                    card.link.drop(self.host, copy)
                card.copies.clear()
                card.staging.start_over()
        for layer, expert in warmed(event, self.scenario.cache):
            card = self.cards[self.card_of[layer]]
            use = card.cache.warm(layer - card.first, expert)
            if use is not None:
                self._load(card, layer, use, phase, urgent=False)

    def _dense(self, event: Event, phase: Phase) -> None:
        """Everything up to the router's answer, for which the host waits."""
        size = self.scenario.dense_bytes / self.header.layers
        if event.layer == 0:
            phase.tokens += event.tokens
            self.host += self.software.host_seconds_per_token
        queued = self.host
        seconds = self._stream_seconds(size, self.scenario.dense_bits, event.tokens)
        self._device_works(queued, seconds, phase)
        phase.dense_seconds += seconds
        self._span("compute", "dense", self.device - seconds, seconds, event.layer)
        self.device += self.software.start_seconds_per_layer
        phase.start_seconds += self.software.start_seconds_per_layer
        self.host += self.software.host_seconds_per_layer
        self.host = max(self.host, self.device)  # the plan needs the router's answer

    def _arrive(self, card: _Card, layer: int, use: Use, phase: Phase) -> None:
        """Wait for the copy into a slot if one is under way."""
        copy = card.copies.pop(use.slot, None)
        if copy is None:
            return
        guessed = not copy.urgent
        arrived = card.link.wait(self.host, copy)
        self._device_works(self.host, 0.0, phase)
        wait = max(0.0, arrived - self.device)
        card.cache.statistics.layers[layer - card.first].wait_seconds += wait
        if guessed:
            phase.guess_wait_seconds += wait
        else:
            phase.urgent_wait_seconds += wait
        self.device += wait
        if self.software.host_waits or not self.hardware.runs_ahead:
            self.host = self.device

    def _compute(self, card: _Card, layer: int, use: Use, tokens: int, phase: Phase) -> None:
        """One expert's products for its `tokens` rows."""
        self.host += self.software.launches_per_expert * self.hardware.launch_seconds
        self._arrive(card, layer, use, phase)
        size = self.header.record_bytes[layer]
        seconds = self._stream_seconds(size, self.scenario.expert_bits, tokens)
        self._device_works(self.host, seconds, phase)
        phase.expert_seconds += seconds
        card.released[use.slot] = self.device
        name = f"expert {use.expert}"
        self._span("compute", name, self.device - seconds, seconds, layer, use.expert)

    def _load(self, card: _Card, layer: int, use: Use, phase: Phase, *, urgent: bool) -> None:
        seconds = self.copy_seconds[layer]
        earliest = card.released.get(use.slot, 0.0)
        before = card.copies.pop(use.slot, None)
        if before is not None and card.link.drop(self.host, before):
            phase.copy_seconds -= before.seconds  # it had not begun
            phase.dropped += 1
        copy = card.link.submit(self.host, seconds, urgent=urgent, earliest=earliest)
        card.copies[use.slot] = copy
        phase.loads += 1
        phase.loaded_bytes += self.header.record_bytes[layer]
        phase.copy_seconds += seconds
        phase.disk_seconds += seconds if self.from_disk[layer] else 0.0
        if self.timeline is not None:
            name = f"{'load' if urgent else 'guess'} {layer}/{use.expert}"
            track = f"link {card.number}"
            self.traced.append((copy, Span(track, name, 0.0, seconds, layer, use.expert)))

    def _begin_early(self, event: Event, early: bool, phase: Phase, halves: int) -> None:
        """Fill the free halves of the staging rows for the next layer, if that is worth it."""
        at = event.layer + 1
        if not early or at == self.header.layers:
            return
        if not nearly_all(len(event.distinct()), self.header.experts[event.layer]):
            return
        card = self.cards[self.card_of[at]]
        local = at - card.first
        wanted = absent(card.cache, local, self.header.experts[at])
        for use in card.staging.early(local, wanted, halves):
            self._load(card, at, use, phase, urgent=True)
            card.cache.statistics.layers[local].early_loads += 1

    def _keep(self, card: _Card, layer: int, kept: Kept, phase: Phase) -> None:
        """Copy an expert that came early from its row to its slot."""
        seconds = 2 * self.header.record_bytes[layer] / (self.hardware.memory_gb_per_s * 1e9)
        self._device_works(self.host, seconds, phase)
        phase.expert_seconds += seconds
        card.released[kept.row] = card.released[kept.slot] = self.device

    def _look_ahead(self, event: Event, loads: int, phase: Phase) -> None:
        """Queue guesses for later layers behind this layer's own loads."""
        said = list(guesses(event, self.scenario.cache))
        if event.layer + 1 == self.header.layers:
            return
        link = self.cards[self.card_of[event.layer + 1]].link
        if event.tokens == 1:
            self.window.guessing(event.layer, loads, self.host + link.backlog(self.host))
        if not said:
            return
        self.host += self.software.guess_seconds
        room = self.window.room(event.layer, loads, self.copy_seconds[event.layer + 1])
        for guess in said:
            card = self.cards[self.card_of[guess.layer]]
            most = min(room, len(guess.experts)) if self.scenario.gentle else len(guess.experts)
            uses = card.cache.look_ahead(guess.layer - card.first, guess.experts, most=most)
            for use in uses:
                self._load(card, guess.layer, use, phase, urgent=False)
            room -= len(uses)

    def _stream_seconds(self, size: float, bits: float, tokens: int) -> float:
        """Read `size` bytes of weights once and multiply them with `tokens` rows."""
        flops = 2 * tokens * size * 8 / bits
        memory = size * self.software.memory_passes / (self.hardware.memory_gb_per_s * 1e9)
        return max(memory, flops / (self.tflops * 1e12))

    def _device_works(self, queued: float, seconds: float, phase: Phase) -> None:
        """Let the device work on something queued at `queued`; a CPU is host and device."""
        phase.host_seconds += max(0.0, queued - self.device)
        self.device = max(self.device, queued) + seconds
        if not self.hardware.runs_ahead:
            self.host = self.device

    def _span(
        self,
        track: str,
        name: str,
        begin: float,
        seconds: float,
        layer: int,
        expert: int | None = None,
    ) -> None:
        if self.timeline is not None:
            self.timeline.add(Span(track, f"{name} ({layer})", begin, seconds, layer, expert))


class _Window:
    """How long a link is certainly free between a layer's own loads and the next decision.

    That is the shortest time seen for each layer and number of loads. A guess that fits into it
    never keeps an urgent copy waiting.
    """

    def __init__(self) -> None:
        self._shortest: dict[tuple[int, int], float] = {}
        self._open: tuple[int, int, float] | None = None  # layer, loads, when the link is free

    def guessing(self, layer: int, loads: int, free_at: float) -> None:
        self._open = (layer, loads, free_at)

    def planned(self, event: Event, now: float) -> None:
        if self._open is not None and event.tokens == 1:
            layer, loads, free_at = self._open
            if event.layer == layer + 1:
                seen = max(0.0, now - free_at)
                key = (layer, loads)
                self._shortest[key] = min(self._shortest.get(key, seen), seen)
        self._open = None

    def room(self, layer: int, loads: int, copy_seconds: float) -> int:
        """Number of copies that fit; 0 before the time has been measured once."""
        return int(self._shortest.get((layer, loads), 0.0) / copy_seconds + 1e-9)
