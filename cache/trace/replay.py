"""What a cache would have done on a recorded run.

Seconds play no part: when a copy lands does not change what a cache decides.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision
from offload.cache.eviction import LayerPools
from offload.cache.policies import POLICIES, Key, Policy, Scored
from offload.cache.sharded import Cache, ShardedCache
from offload.cache.statistics import LayerCounts
from offload.cache.trace.trace import CacheError, CardSlots, Event, Guess, Trace, TraceHeader

NEVER = 1 << 60  # a time after every use in a trace


class LFU(Scored):
    """Least frequently used: a key is worth all its uses, also those before it left."""

    def __init__(self) -> None:
        super().__init__()
        self._uses = defaultdict[Key, float](float)  # of every key that was ever resident

    def score(self, key: Key, weight: float) -> float:
        self._uses[key] += weight
        return self._uses[key]


class Belady(Scored):
    """The key whose next use is farthest leaves first (L. A. Belady, 1966): the optimum.

    It needs hindsight, so it exists for replays only.
    """

    def __init__(self, future: Iterable[tuple[int, Iterable[int]]]) -> None:
        """`future` has the layer and the experts of every step to come, in order."""
        super().__init__()
        self._uses = defaultdict[Key, list[int]](list)  # times of a key's uses, the next one last
        for time, (layer, experts) in reversed(list(enumerate(future))):
            for expert in experts:
                self._uses[layer, expert].append(time)

    def score(self, key: Key, weight: float) -> float:
        uses = self._uses[key]
        if weight:  # not a load before anybody asked
            uses.pop()
        return -uses[-1] if uses else -NEVER


class OnePool(LayerPools):
    """One pool for the keys of all layers, whose clock advances at every step of a layer."""

    def __init__(self, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(layers, policy)
        self.pools = self.pools[:1] * layers

    def use(self, layer: int, keys: Iterable[Key], weight: float) -> None:
        self.pools[0].step()
        self.pools[0].use(keys, weight)

    def evict(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        found: list[Key] = []
        while len(found) < count and (victim := self.pools[0].first(keep)) is not None:
            found.append(victim[2])
            self.remove(victim[2])
        return found

    def keys(self) -> Iterator[Key]:
        return iter(self.pools[0].keys())


BELADY = "belady"
REPLAYED: dict[str, Callable[[], Policy]] = {**POLICIES, "lfu": LFU}  # and `BELADY`
NONE, LIVE, ROUTER = "none", "live", "router"  # no look-ahead, the recorded one, the routers'


@dataclass(frozen=True)
class Setup:
    """One way to replay a trace. Raises `CacheError` for unknown names and impossible numbers.

    `lookahead` says which guesses load ahead: NONE of them, those that the run itself acted on
    (LIVE), or those that each next layer's router made, whether or not the run acted on them
    (ROUTER).
    """

    slots: int
    policy: str
    lookahead: str = NONE
    cards: tuple[CardSlots, ...] = ()  # what each of several cards has; empty for one card

    def __post_init__(self) -> None:
        for what, name, known in (
            ("policy", self.policy, (*REPLAYED, BELADY)),
            ("look-ahead", self.lookahead, (NONE, LIVE, ROUTER)),
        ):
            if name not in known:
                raise CacheError(f"there is no {what} {name!r}: choose among {', '.join(known)}")
        if self.slots < 1:
            raise CacheError(f"a cache needs at least one slot, not {self.slots}")
        if self.cards and sum(card.slots for card in self.cards) != self.slots:
            raise CacheError(f"the slots of the GPUs do not add up to {self.slots}")


@dataclass(frozen=True)
class Outcome:
    """What a replay counted."""

    setup: Setup
    layers: tuple[LayerCounts, ...]
    bytes_loaded: int

    @property
    def counts(self) -> LayerCounts:
        return sum(self.layers, LayerCounts())


def recorded_setup(trace: Trace) -> Setup:
    """The setup of the recorded run: a replay with it decides what the run decided.

    Raises `CacheError` where the trace does not say enough, or names a policy or an allocation that
    this version no longer has.
    """
    settings = trace.header.settings
    slots, policy = settings.get("slots"), settings.get("policy")
    if not isinstance(slots, int):
        raise CacheError("the trace does not say how many slots its run had: give --expert-slots")
    if policy not in POLICIES or settings.get("allocation", "shared") != "shared":
        raise CacheError(
            f"the trace was recorded with policy {policy} and allocation "
            f"{settings.get('allocation')}, which this version cannot repeat: give --policy and "
            "--expert-slots"
        )
    return Setup(slots, str(policy), LIVE, _cards(trace.header))


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
        raise CacheError(f"the trace's GPUs ({text}) do not hold its {header.layers} layers")
    return cards


def make_cache(trace: Trace, setup: Setup) -> Cache:
    """An empty cache as `setup` says, with at most as many slots as there are experts."""
    if not setup.cards:
        return make_one(trace, setup)
    caches, first = [], 0
    for layers, slots in setup.cards:
        part = card_trace(trace, first, first + layers)
        caches.append(make_one(part, replace(setup, slots=slots, cards=())))
        first += layers
    return ShardedCache(caches)


def make_one(trace: Trace, setup: Setup) -> ExpertCache:
    """`make_cache` for a single card."""
    slots, layers = min(setup.slots, trace.header.total_experts), trace.header.layers
    if setup.policy != BELADY:
        return ExpertCache(slots, layers, REPLAYED[setup.policy])
    future = Belady((event.layer, event.distinct()) for event in trace.events)
    # The optimum is one policy for all layers, which goes on where a run emptied its slots.
    return ExpertCache(slots, layers, lambda: future, OnePool)


def card_trace(trace: Trace, first: int, end: int) -> Trace:
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
    after: Callable[[Cache, Event, Decision], None] | None = None,
) -> Outcome:
    """Run `setup` over `trace`; `after` is called at the end of each event."""
    cache = make_cache(trace, setup)
    replay_with(trace, cache, setup, lambda event: guesses(event, setup), after)
    layers = tuple(replace(counts) for counts in cache.statistics.layers)
    sizes = trace.header.record_bytes
    loaded = sum(counts.loads * size for counts, size in zip(layers, sizes, strict=True))
    return Outcome(setup, layers, loaded)


def replay_with(
    trace: Trace,
    cache: Cache,
    setup: Setup,
    guess: Callable[[Event], Iterable[Guess]],
    after: Callable[[Cache, Event, Decision], None] | None = None,
) -> None:
    """Make the calls on `cache` that an engine makes; `guess` says what to load ahead."""
    for event in trace.events:
        if event.fresh:
            cache.forget()
        for key in warmed(event, setup):
            cache.warm(*key)
        admit = admitted(event, setup, trace.header)
        decision = cache.decide(event.layer, event.distinct(), prompt=event.prompt, admit=admit)
        for ahead in guess(event):
            cache.look_ahead(ahead.layer, ahead.experts, most=len(ahead.experts))
        if after is not None:
            after(cache, event, decision)


def admitted(event: Event, setup: Setup, header: TraceHeader) -> int | None:
    """How many of an event's experts may evict others (`ExpertCache.decide`): None for all.

    All of them may where every expert has a slot, and with Belady's policy, which has to be told of
    every use.
    """
    everything_fits = setup.slots >= header.total_experts
    return None if everything_fits or setup.policy == BELADY else event.admit


def warmed(event: Event, setup: Setup) -> Sequence[Key]:
    """The keys that a warm start loaded before `event`; none with Belady's policy, which would
    count the loads as uses."""
    return () if setup.policy == BELADY else event.warmed


def guesses(event: Event, setup: Setup) -> Iterable[Guess]:
    """What is guessed during `event` under `setup`."""
    if setup.lookahead == NONE:
        return ()
    if setup.lookahead == LIVE:
        return [guess for guess in event.guesses if guess.live]
    return [guess for guess in event.guesses if guess.layer == event.layer + 1]
