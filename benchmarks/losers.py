"""Policies, allocations and predictors that lost, kept so that the log can be repeated."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Protocol

from offload.cache.cache import ExpertCache
from offload.cache.policies import LRU, Key, Policy, Victim
from offload.cache.trace.trace import Event, Guess

MOST_AHEAD = 3  # layers


class FIFO(LRU):
    """First in, first out: only becoming resident counts as a use."""

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        pass


PROTECTED_SHARE = 0.8  # of the resident keys, at most; Karedla et al. found 0.6 to 0.8 best
SEGMENT = 1e9  # how much more a protected key is worth: more than any key on probation


class SLRU:
    """Segmented LRU: a key that is used again is protected from keys used once."""

    def __init__(self) -> None:
        # Key -> (step of the last use, slot), in the order of the last uses.
        self._probation: OrderedDict[Key, tuple[int, int]] = OrderedDict()
        self._protected: OrderedDict[Key, tuple[int, int]] = OrderedDict()
        self._unused: set[Key] = set()  # loaded before they were asked for
        self._now = 0

    def step(self) -> None:
        self._now += 1

    def insert(self, keys: Sequence[Key], slots: Sequence[int], weight: float = 1.0) -> None:
        for key, slot in zip(keys, slots, strict=True):
            self._probation[key] = self._now, slot
            if weight == 0:
                self._unused.add(key)

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            first = key in self._unused
            self._unused.discard(key)
            if key in self._protected or (weight >= 1 and not first):
                self._protect(key)
            else:  # a prompt's use makes a key recent, but does not prove it
                self._probation[key] = self._now, self._probation[key][1]
                self._probation.move_to_end(key)

    def _protect(self, key: Key) -> None:
        _, slot = self._probation.pop(key, None) or self._protected[key]
        self._protected[key] = self._now, slot
        self._protected.move_to_end(key)
        resident = len(self._probation) + len(self._protected)
        if len(self._protected) > PROTECTED_SHARE * resident:
            oldest, known = self._protected.popitem(last=False)
            self._probation[oldest] = known

    def remove(self, key: Key) -> None:
        self._unused.discard(key)
        del (self._probation if key in self._probation else self._protected)[key]

    def clear(self) -> None:
        self._probation.clear()
        self._protected.clear()
        self._unused.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        for segment, factor in ((self._probation, 1.0), (self._protected, SEGMENT)):
            for key, (used, slot) in segment.items():
                if key not in keep:
                    return factor / (1 + self._now - used), slot, key
        return None

    def keys(self) -> Iterable[Key]:
        return self._probation.keys() | self._protected.keys()


class QuotaCache(ExpertCache):
    """A cache in which no layer has more than its share of the slots."""

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(slots, layers, policy)
        shares = (slots // layers + (layer < slots % layers) for layer in range(layers))
        self._quotas = [max(1, share) for share in shares]
        self._too_few = slots < layers

    def _take_slots(self, layer: int, count: int, *, evict: int) -> list[int]:
        resident: Iterable[Key] = self._pools.keys()
        held = Counter(giver for giver, _ in resident)
        room = min(count, self._quotas[layer] - held[layer])
        slots: list[int] = []
        while len(slots) < room and (slot := self.table.take_free()) is not None:
            slots.append(slot)
        useless = [key for key in self._useless if key not in self._keep and key[0] == layer]
        slots += self._evict(layer, useless[: count - len(slots)])
        own = held[layer] or not self._too_few
        givers = [layer] if own else sorted(held, key=lambda giver: (-held[giver], giver))
        for giver in givers:
            pool = self._pools.pools[giver]
            while len(slots) < evict and (victim := pool.first(self._keep)) is not None:
                slots += self._evict(layer, [victim[2]])
                if not own:
                    return slots
        return slots


class Predictor(Protocol):
    """Guesses a layer's experts from the choices that it observed."""

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """The step of `layer` for one generated token asked for `experts`."""

    def guess(self, layer: int, ahead: int) -> list[int]:
        """Experts of layer `layer + ahead`, likeliest first; `layer` was observed just now."""


class Previous:
    """The experts that the layer was asked for at the token before."""

    def __init__(self, layers: int) -> None:
        self._last: list[list[int]] = [[] for _ in range(layers)]

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._last[layer] = list(experts)

    def guess(self, layer: int, ahead: int) -> list[int]:
        return list(self._last[layer + ahead])


class Transitions:
    """The experts that followed most often on the ones the present layer was asked for."""

    def __init__(self, layers: int) -> None:
        self._last: list[list[int]] = [[] for _ in range(layers)]
        # (layer, layers ahead, expert) -> how often each expert there followed on it
        self._followed: dict[tuple[int, int, int], Counter[int]] = {}

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        for ahead in range(1, min(MOST_AHEAD, layer) + 1):
            for expert in self._last[layer - ahead]:
                key = (layer - ahead, ahead, expert)
                self._followed.setdefault(key, Counter()).update(experts)
        self._last[layer] = list(experts)

    def guess(self, layer: int, ahead: int) -> list[int]:
        votes: Counter[int] = Counter()
        for expert in self._last[layer]:
            votes.update(self._followed.get((layer, ahead, expert), ()))
        return [expert for expert, _ in votes.most_common(len(self._last[layer]))]


class Union:
    """The experts that either of two predictors names, taken in turns."""

    def __init__(self, one: Predictor, other: Predictor) -> None:
        self._both = (one, other)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        for predictor in self._both:
            predictor.observe(layer, experts)

    def guess(self, layer: int, ahead: int) -> list[int]:
        one, other = (predictor.guess(layer, ahead) for predictor in self._both)
        return merged(one, other)


def merged(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Both lists in turns, likeliest first, each expert once."""
    longest = max(len(one), len(other))
    turns = (place[at] for at in range(longest) for place in (one, other) if at < len(place))
    return list(dict.fromkeys(turns))


PREDICTORS = ("router", "previous", "transitions", "union")


class Guesser:
    """Guesses for the `ahead` layers after the one at work, as the predictor `name` makes them.

    "router" takes the guesses that routers made during the run and the trace has; "union" adds to
    these what "previous" and "transitions" say.
    """

    def __init__(self, name: str, ahead: int, layers: int) -> None:
        self._asks_router = name in ("router", "union")
        self._ahead, self._layers = ahead, layers
        self._predictor: Predictor | None = {
            "router": lambda: None,
            "previous": lambda: Previous(layers),
            "transitions": lambda: Transitions(layers),
            "union": lambda: Union(Previous(layers), Transitions(layers)),
        }[name]()

    def __call__(self, event: Event) -> Iterator[Guess]:
        """What is guessed during `event`, the nearest layer first."""
        by_layer: dict[int, list[int]] = {}
        if self._asks_router:
            by_layer = {
                guess.layer: list(guess.experts)
                for guess in event.guesses
                if guess.layer - event.layer <= self._ahead
            }
        if self._predictor is not None and not event.prompt and event.tokens == 1:
            self._predictor.observe(event.layer, event.experts[0])
            for distance in range(1, min(self._ahead, self._layers - 1 - event.layer) + 1):
                layer = event.layer + distance
                said = self._predictor.guess(event.layer, distance)
                by_layer[layer] = merged(by_layer.get(layer, []), said)
        for layer in sorted(by_layer):
            if by_layer[layer]:
                yield Guess(layer, tuple(by_layer[layer]))
