"""What a cache would have done on a recorded run.

Knows: the order of calls an engine makes on its cache. Does not know: seconds; when a copy lands
does not change what a cache decides.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count

from offload.cache.allocation import ALLOCATIONS
from offload.cache.cache import ExpertCache
from offload.cache.errors import CacheError
from offload.cache.guesses import (
    MOST_AHEAD,
    PREDICTORS,
    WITH_ROUTER,
    Predictor,
    make_predictor,
    merged,
)
from offload.cache.interface import Cache
from offload.cache.policies import POLICIES
from offload.cache.policy import Key, Policy, Victim
from offload.cache.sharded import ShardedCache
from offload.cache.statistics import LayerCounts
from offload.cache.trace.trace import CardSlots, Event, Guess, Trace, TraceHeader

NEVER = 1 << 60


class Belady:
    """Keys in the order of their next use, the farthest first."""

    def __init__(self, future: Iterable[tuple[int, Iterable[int]]]) -> None:
        """`future`: layer and experts of every step to come, in order."""
        self._uses: dict[Key, list[int]] = {}  # times, the next one last
        times = count()
        for layer, experts in future:
            time = next(times)
            for expert in experts:
                self._uses.setdefault((layer, expert), []).append(time)
        for uses in self._uses.values():
            uses.reverse()
        self._resident: set[Key] = set()
        self._heap: list[tuple[int, Key]] = []  # (-next use, key); old entries stay until the top

    def step(self) -> None:
        pass

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._resident.add(key)
            self._use(key, weight)

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._use(key, weight)

    def _use(self, key: Key, weight: float) -> None:
        if weight:
            self._uses[key].pop()
        heappush(self._heap, (-self._next(key), key))

    def _next(self, key: Key) -> int:
        uses = self._uses.get(key)
        return uses[-1] if uses else NEVER

    def remove(self, key: Key) -> None:
        self._resident.discard(key)

    def clear(self) -> None:
        self._resident.clear()
        self._heap.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        kept: list[tuple[int, Key]] = []
        found: Victim | None = None
        while self._heap and found is None:
            negative, key = self._heap[0]
            if key not in self._resident or -negative != self._next(key):
                heappop(self._heap)
            elif key in keep:
                kept.append(heappop(self._heap))
            else:
                found = negative, key
        for entry in kept:
            heappush(self._heap, entry)
        return found

    def keys(self) -> Iterable[Key]:
        return self._resident


BELADY = "belady"
LIVE, NONE = "live", "none"  # look-ahead as it was recorded; no look-ahead


@dataclass(frozen=True)
class Setup:
    """One way to run a trace. Raises `CacheError` for names and numbers that are none."""

    slots: int
    policy: str = "lru"
    allocation: str = "shared"
    lookahead: str = NONE  # LIVE, NONE, or the name of a predictor
    ahead: int = 1  # layers
    cards: tuple[CardSlots, ...] = ()  # that the slots are on; empty: one

    def __post_init__(self) -> None:
        for what, name, known in (
            ("policy", self.policy, (*POLICIES, BELADY)),
            ("allocation", self.allocation, ALLOCATIONS),
            ("look-ahead", self.lookahead, (NONE, LIVE, *PREDICTORS)),
        ):
            if name not in known:
                raise CacheError(f"there is no {what} {name!r}: choose among {', '.join(known)}")
        if not 1 <= self.ahead <= MOST_AHEAD:
            raise CacheError(f"cannot look {self.ahead} layers ahead: choose 1 to {MOST_AHEAD}")
        if self.slots < 1:
            raise CacheError(f"a cache needs at least one slot, not {self.slots}")
        if self.cards and sum(card.slots for card in self.cards) != self.slots:
            raise CacheError(f"the cards' slots are not the {self.slots} of all")


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    setup: Setup
    layers: tuple[LayerCounts, ...]
    tokens: int
    bytes_loaded: int

    @property
    def counts(self) -> LayerCounts:
        return sum(self.layers, LayerCounts())

    @property
    def loads_per_token(self) -> float:
        return self.counts.loads / self.tokens if self.tokens else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_loaded / self.tokens if self.tokens else 0.0


def recorded_setup(trace: Trace) -> Setup:
    """How the trace was recorded: replayed so, it does what the live run did."""
    settings = trace.header.settings
    slots, policy, allocation = (settings.get(n) for n in ("slots", "policy", "allocation"))
    if not isinstance(slots, int):
        raise CacheError("the trace does not say how many slots its run had: give --expert-slots")
    return Setup(slots, str(policy), str(allocation), LIVE, cards=_cards(trace.header))


def _cards(header: TraceHeader) -> tuple[CardSlots, ...]:
    text = header.settings.get("cards")
    if not text:
        return ()
    try:
        pairs = (part.split(":") for part in str(text).split(","))
        cards = tuple(CardSlots(int(layers), int(slots)) for layers, slots in pairs)
    except ValueError:
        cards = ()
    if sum(card.layers for card in cards) != header.layers or min(map(min, cards)) < 1:
        raise CacheError(f"the trace's cards ({text}) are not those of {header.layers} layers")
    return cards


def make_policy(name: str, trace: Trace) -> Callable[[], Policy]:
    """A maker of the policy called `name`; Belady's learns the future from `trace`."""
    if name == BELADY:
        future = Belady((event.layer, event.distinct()) for event in trace.events)
        return lambda: future  # one for all layers, that goes on where the slots were emptied
    return POLICIES[name]


def make_cache(trace: Trace, setup: Setup) -> Cache:
    """An empty cache as `setup` says; more slots than experts are of no use, and left out."""
    if not setup.cards:
        return make_one(trace, setup)
    caches, first = [], 0
    for layers, slots in setup.cards:
        part = layers_of(trace, first, first + layers)
        caches.append(make_one(part, replace(setup, slots=slots, cards=())))
        first += layers
    return ShardedCache(caches)


def make_one(trace: Trace, setup: Setup) -> ExpertCache:
    """`make_cache` for a single card."""
    slots = min(setup.slots, trace.header.total_experts)
    allocation = "global" if setup.policy == BELADY else setup.allocation  # it knows all layers
    policy = make_policy(setup.policy, trace)
    return ExpertCache(slots, trace.header.layers, policy, allocation)


def layers_of(trace: Trace, first: int, end: int) -> Trace:
    """The part of a trace that one card serves, its layers counted from 0."""
    header = trace.header
    part = replace(
        header, experts=header.experts[first:end], record_bytes=header.record_bytes[first:end]
    )
    events = (e._replace(layer=e.layer - first) for e in trace.events if first <= e.layer < end)
    return Trace(part, list(events))


def replay(
    trace: Trace,
    setup: Setup,
    after: Callable[[Cache, Event], None] | None = None,
) -> Outcome:
    """Run `setup` over `trace`; `after` is called after each event."""
    cache = make_cache(trace, setup)
    predictor = make_predictor(setup.lookahead, trace.header.layers)
    for event in trace.events:
        prepare(cache, event, setup)
        admit = admitted(event, setup, trace.header)
        cache.decide(event.layer, event.distinct(), prompt=event.prompt, admit=admit)
        for guess in guesses(event, setup, predictor, trace.header.layers):
            cache.look_ahead(guess.layer, guess.experts, most=len(guess.experts))
        if after is not None:
            after(cache, event)
    return _outcome(trace, setup, cache)


def prepare(cache: Cache, event: Event, setup: Setup) -> None:
    """What changed who is resident since the event before."""
    if event.fresh:
        cache.forget()
    for key in warmed(event, setup):
        cache.warm(*key)


def admitted(event: Event, setup: Setup, header: TraceHeader) -> int | None:
    """How many of an event's experts may evict: all of them where everything fits, and with
    Belady's, who is to be told of every use."""
    everything_fits = setup.slots >= header.total_experts
    return None if everything_fits or setup.policy == BELADY else event.admit


def warmed(event: Event, setup: Setup) -> Sequence[Key]:
    """What a warm start loaded before `event`; Belady's would take that for the uses to come."""
    return () if setup.policy == BELADY else event.warmed


def guesses(
    event: Event, setup: Setup, predictor: Predictor | None, layers: int
) -> Iterable[Guess]:
    """What is guessed during `event`, the nearest layer first."""
    if setup.lookahead == LIVE:
        return (guess for guess in event.guesses if guess.live)
    routed = [g for g in event.guesses if g.layer - event.layer <= setup.ahead]
    if predictor is None or event.prompt or event.tokens != 1:
        return routed if setup.lookahead in WITH_ROUTER else ()
    predictor.observe(event.layer, event.experts[0])
    named = said(predictor, event.layer, setup.ahead, layers)
    return united(routed, named) if setup.lookahead in WITH_ROUTER else named


def said(predictor: Predictor, layer: int, ahead: int, layers: int) -> Iterator[Guess]:
    """Its guesses for the `ahead` layers that follow `layer`."""
    for distance in range(1, min(ahead, layers - 1 - layer) + 1):
        if experts := predictor.guess(layer, distance):
            yield Guess(layer + distance, tuple(experts))


def united(some: Iterable[Guess], others: Iterable[Guess]) -> Iterator[Guess]:
    """One guess a layer, of what both say for it."""
    by_layer: dict[int, tuple[int, ...]] = {}
    for layer, experts, _ in (*some, *others):
        by_layer[layer] = tuple(merged(by_layer.get(layer, ()), experts))
    return (Guess(layer, by_layer[layer]) for layer in sorted(by_layer))


def _outcome(trace: Trace, setup: Setup, cache: Cache) -> Outcome:
    layers = tuple(replace(counts) for counts in cache.statistics.layers)
    sizes = trace.header.record_bytes
    loaded = sum(counts.loads * size for counts, size in zip(layers, sizes, strict=True))
    return Outcome(setup, layers, trace.tokens, loaded)
