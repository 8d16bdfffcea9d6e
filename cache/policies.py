"""Eviction policies: what it is worth to keep each resident expert of one layer."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

Key = tuple[int, int]  # (MoE layer, expert)

# A key that may leave: its worth, its slot, the key. The smallest tuple leaves first, so of equal
# worths the lower slot. The worth says how likely the next step of the key's layer asks for it; all
# pools of one policy share a unit.
Victim = tuple[float, int, Key]


class Policy(Protocol):
    """Values the resident keys of one pool, which is a layer's or a whole tier's.

    `weight` says how much a use counts: 1 for a generated token, less for a prompt, 0 for a key
    that was loaded before anybody asked for it.
    """

    def step(self) -> None:
        """Advance the pool's clock: its layer is about to be asked once more."""

    def insert(self, keys: Sequence[Key], slots: Sequence[int], weight: float = 1.0) -> None:
        """`keys` became resident, each in the slot at the same place of `slots`."""

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        """The resident `keys` were asked for."""

    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""

    def clear(self) -> None:
        """Nothing is resident any more."""

    def first(self, keep: Container[Key]) -> Victim | None:
        """The first victim among the keys that are not in `keep`; it stays in the pool."""

    def keys(self) -> Iterable[Key]:
        """The resident keys, for checks."""


class KeyState(NamedTuple):
    """What a policy knows of a key."""

    score: float  # the uses that the policy counts, 0 where it counts none
    used: int  # the pool's step at the last use, or any other number if the last use was not recent


class PoolState(NamedTuple):
    """What a policy knows, as values from which another policy of its kind can go on."""

    now: int  # the pool's step
    unit: float  # what a use counts now
    keys: dict[Key, KeyState]  # every key that the policy knows, resident or not


class PortablePolicy(Policy, Protocol):
    """A policy whose state can be taken to a GPU and back."""

    def state(self) -> PoolState:
        """Everything the policy knows."""

    def adopt(self, state: PoolState, slots: Mapping[Key, int]) -> None:
        """Go on from `state`; the keys in `slots` are resident, in these slots."""


class Ranking:
    """Resident keys, sorted by their score and then by their slot.

    An entry is a `Victim` with the score in place of the worth.
    """

    def __init__(self) -> None:
        self._order: list[Victim] = []
        self._entries: dict[Key, Victim] = {}

    def __iter__(self) -> Iterator[Victim]:
        """The entries, lowest first."""
        return iter(self._order)

    def add(self, key: Key, slot: int, score: float) -> None:
        entry = self._entries[key] = score, slot, key
        insort(self._order, entry)

    def extend(self, entries: Iterable[Victim]) -> None:
        """Add many keys at once."""
        for entry in entries:
            self._entries[entry[2]] = entry
            self._order.append(entry)
        self._order.sort()

    def remove(self, key: Key) -> int:
        """Take `key` out and return its slot."""
        entry = self._entries.pop(key)
        del self._order[bisect_left(self._order, entry)]
        return entry[1]

    def clear(self) -> None:
        self._order.clear()
        self._entries.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        """The lowest entry whose key is not in `keep`."""
        for entry in self._order:
            if entry[2] not in keep:
                return entry
        return None


class Scored:
    """A policy that gives a key a score at each use; the key of the lowest score leaves first."""

    def __init__(self) -> None:
        self._ranking = Ranking()

    def score(self, key: Key, weight: float) -> float:
        """The score of `key` from now on: it is used, and the use counts `weight`."""
        raise NotImplementedError

    def step(self) -> None:
        """Nothing changes: scores depend on uses only."""

    def insert(self, keys: Sequence[Key], slots: Sequence[int], weight: float = 1.0) -> None:
        for key, slot in zip(keys, slots, strict=True):
            self._ranking.add(key, slot, self.score(key, weight))

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._ranking.add(key, self._ranking.remove(key), self.score(key, weight))

    def remove(self, key: Key) -> None:
        self._ranking.remove(key)

    def clear(self) -> None:
        self._ranking.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        return self._ranking.first(keep)

    def keys(self) -> Iterable[Key]:
        return [key for _, _, key in self._ranking]


class LRU(Scored):
    """Least recently used: a key is worth less the longer ago its last use was."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0

    def step(self) -> None:
        self._now += 1

    def score(self, key: Key, weight: float) -> float:
        return self._now

    def first(self, keep: Container[Key]) -> Victim | None:
        victim = super().first(keep)
        if victim is None:
            return None
        used, slot, key = victim
        return 1.0 / (1 + self._now - used), slot, key

    def state(self) -> PoolState:
        used = {key: KeyState(0.0, int(score)) for score, _, key in self._ranking}
        return PoolState(self._now, 1.0, used)

    def adopt(self, state: PoolState, slots: Mapping[Key, int]) -> None:
        self._now = state.now
        self.clear()
        known = state.keys
        self._ranking.extend((known[key].used, slots[key], key) for key in known if key in slots)


HALF_LIFE = 16.0  # steps of a layer, that is tokens; docs/log/policies.md compares others
REPEATS = 0.1  # with more, models of few experts a layer lose hits: docs/log/policies.md
MOST = 2.0**400  # a use may count as much before all scores are scaled down
SPLIT = 2.0**27 + 1.0  # Dekker's constant (1971): leaves 26 of the 53 bits of a float


def growth_of(half_life: float) -> float:
    """How much more a use counts than one a step before."""
    growth: float = 2.0 ** (1.0 / half_life)
    return growth


def bonus_of(half_life: float, repeats: float) -> float:
    """What having been asked for at the last step is worth, in uses."""
    return repeats / (1.0 - repeats) / (1.0 - 1.0 / growth_of(half_life))


def to_26_bits(score: float) -> float:
    """`score` to 26 bits.

    Scores that differ only because their uses were added up in another order become equal, and
    what is still different stays different after the multiplications of a worth. The order of
    victims is therefore the same wherever it is computed.
    """
    large = score * SPLIT
    return large - (large - score)


class LFRU:
    """Frequency with recency: a key is worth its decayed uses, and more if it was just used.

    Uses are remembered when a key leaves. A key that was used at the last step has a bonus until
    the next one.
    """

    def __init__(self, half_life: float = HALF_LIFE, repeats: float = REPEATS) -> None:
        self._growth = growth_of(half_life)
        self._unit = 1.0  # what a use counts now
        self._inverse = 1.0  # 1 / unit
        self._bonus = bonus_of(half_life, repeats)  # in units
        self._scores: defaultdict[Key, float] = defaultdict(float)  # of every key ever resident
        self._recent: dict[Key, int] = {}  # resident keys used since the last step -> slot
        self._idle = Ranking()  # the other resident keys, whose scores do not change

    def step(self) -> None:
        scores = self._scores
        self._idle.extend(
            [(to_26_bits(scores[key]), slot, key) for key, slot in self._recent.items()]
        )
        self._recent.clear()
        self._unit *= self._growth
        if self._unit > MOST:
            self._scale_down()
        self._inverse = 1.0 / self._unit

    def _scale_down(self) -> None:
        for key in self._scores:
            self._scores[key] /= self._unit
        self._unit = 1.0
        idle = [(to_26_bits(self._scores[key]), slot, key) for _, slot, key in self._idle]
        self._idle.clear()
        self._idle.extend(idle)

    def insert(self, keys: Sequence[Key], slots: Sequence[int], weight: float = 1.0) -> None:
        for key, slot in zip(keys, slots, strict=True):
            self._scores[key] += weight * self._unit
            if weight:
                self._recent[key] = slot
            else:
                self._idle.add(key, slot, to_26_bits(self._scores[key]))

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        counted = weight * self._unit
        for key in keys:
            self._scores[key] += counted
            if key not in self._recent:
                self._recent[key] = self._idle.remove(key)

    def remove(self, key: Key) -> None:
        if self._recent.pop(key, None) is None:
            self._idle.remove(key)

    def clear(self) -> None:
        self._recent.clear()
        self._idle.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        found: Victim | None = None
        inverse, bonus = self._inverse, self._bonus
        if (idle := self._idle.first(keep)) is not None:
            score, slot, key = idle
            found = score * inverse, slot, key
            if found[0] < bonus:
                return found
        for key, slot in self._recent.items():  # a key with a bonus may be worth less
            if key not in keep:
                victim = to_26_bits(self._scores[key]) * inverse + bonus, slot, key
                if found is None or victim < found:
                    found = victim
        return found

    def keys(self) -> Iterable[Key]:
        return [*self._recent, *(key for _, _, key in self._idle)]

    def state(self) -> PoolState:
        keys = {
            key: KeyState(score, 0 if key in self._recent else -1)
            for key, score in self._scores.items()
        }
        return PoolState(0, self._unit, keys)

    def adopt(self, state: PoolState, slots: Mapping[Key, int]) -> None:
        self._unit, self._inverse = state.unit, 1.0 / state.unit
        self._scores = defaultdict(float, ((key, known.score) for key, known in state.keys.items()))
        self.clear()
        for key, known in state.keys.items():
            if key in slots and known.used == state.now:
                self._recent[key] = slots[key]
            elif key in slots:
                self._idle.add(key, slots[key], to_26_bits(known.score))


POLICIES: dict[str, Callable[[], PortablePolicy]] = {"lfru": LFRU, "lru": LRU}
