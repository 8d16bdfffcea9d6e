"""Least recently used leaves first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable

from offload.cache.policy import Key, KeyState, Policy, PoolState, Victim


class LRU:
    """Keys in the order of their last use, with the step of it."""

    def __init__(self) -> None:
        self._used: OrderedDict[Key, int] = OrderedDict()
        self._now = 0

    def step(self) -> None:
        self._now += 1

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._used[key] = self._now

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._used[key] = self._now
            self._used.move_to_end(key)

    def remove(self, key: Key) -> None:
        del self._used[key]

    def clear(self) -> None:
        self._used.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        for key, used in self._used.items():
            if key not in keep:
                return 1.0 / (1 + self._now - used), key
        return None

    def keys(self) -> Iterable[Key]:
        return self._used

    def state(self) -> PoolState:
        keys = {
            key: KeyState(0.0, number, used)
            for number, (key, used) in enumerate(self._used.items(), start=1)
        }
        return PoolState(self._now, 1.0, len(keys), keys)

    def adopt(self, state: PoolState, resident: Container[Key]) -> None:
        self._now = state.now
        oldest_first = sorted(state.keys.items(), key=lambda item: item[1].number)
        self._used = OrderedDict((key, at.used) for key, at in oldest_first if key in resident)


class FIFO(LRU):
    """LRU in which only becoming resident counts as a use."""

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        pass


Entry = tuple[float, int, Key]  # score, number of the insertion, key


class Ranking:
    """Entries, the lowest score first, the longer resident of equals first."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        insort(self.entries, entry)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Add many at once."""
        self.entries.extend(entries)
        self.entries.sort()

    def remove(self, entry: Entry) -> None:
        del self.entries[bisect_left(self.entries, entry)]

    def clear(self) -> None:
        self.entries.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        """The lowest entry whose key is not in `keep`."""
        for score, _, key in self.entries:
            if key not in keep:
                return score, key
        return None


HALF_LIFE = 16.0  # steps of a layer, that is tokens; docs/log.md compares others
REPEATS = 0.1  # more of them on models of few experts a layer would be wrong, see docs/log.md
MOST = 2.0**400  # what a use may count before all scores are scaled down


def growth_of(half_life: float) -> float:
    """How much more a use counts than one a step before."""
    growth: float = 2.0 ** (1.0 / half_life)
    return growth


def bonus_of(half_life: float, repeats: float) -> float:
    """What having been asked for at the last step is worth, in uses."""
    return repeats / (1.0 - repeats) / (1.0 - 1.0 / growth_of(half_life))


class LFRU:
    """Keys in the order of their decayed uses, those of keys that left included; what was used at
    the last step has a bonus until the next."""

    def __init__(self, half_life: float = HALF_LIFE, repeats: float = REPEATS) -> None:
        self._growth = growth_of(half_life)
        self._unit = 1.0  # what a use counts now
        self._inverse = 1.0  # 1 / unit
        self._bonus = bonus_of(half_life, repeats)  # in units
        self._insertions = 0
        self._known: dict[Key, _Standing] = {}  # every key that ever was resident
        self._recent: list[_Standing] = []  # resident, used since the last step
        self._idle = Ranking()  # the other resident keys: their scores stay as they are

    def step(self) -> None:
        rest: list[Entry] = []
        for standing in self._recent:
            entry = standing.entry = (standing.score, standing.number, standing.key)
            rest.append(entry)
        self._idle.extend(rest)
        self._recent.clear()
        self._unit *= self._growth
        if self._unit > MOST:
            self._scale_down()
        self._inverse = 1.0 / self._unit

    def _scale_down(self) -> None:
        for standing in self._known.values():
            standing.score /= self._unit
        self._unit = 1.0
        idle = [self._known[key] for _, _, key in self._idle.entries]
        self._idle.clear()
        self._idle.extend([standing.rest() for standing in idle])

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            standing = self._known.get(key)
            if standing is None:
                standing = self._known[key] = _Standing(key)
            self._insertions += 1
            standing.number = self._insertions
            standing.score += weight * self._unit
            if weight:
                self._recent.append(standing)
            else:
                self._idle.add(standing.rest())

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        counted = weight * self._unit
        for key in keys:
            standing = self._known[key]
            standing.score += counted
            if standing.entry is not None:
                self._idle.remove(standing.entry)
                standing.entry = None
                self._recent.append(standing)

    def remove(self, key: Key) -> None:
        standing = self._known[key]
        if standing.entry is None:
            self._recent.remove(standing)
        else:
            self._idle.remove(standing.entry)
            standing.entry = None

    def clear(self) -> None:
        for key in self.keys():
            self._known[key].entry = None
        self._recent.clear()
        self._idle.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        idle = self._idle.first(keep)
        found = None if idle is None else (idle[0] * self._inverse, idle[1])
        if found is None or found[0] > self._bonus:  # what was just used may be worth less
            recent = [standing for standing in self._recent if standing.key not in keep]
            if recent:
                least = min(recent, key=lambda standing: (standing.score, standing.number))
                worth = least.score * self._inverse + self._bonus
                if found is None or worth < found[0]:
                    return worth, least.key
        return found

    def state(self) -> PoolState:
        recent = {standing.key for standing in self._recent}
        keys = {
            key: KeyState(known.score, known.number, 0 if key in recent else -1)
            for key, known in self._known.items()
        }
        return PoolState(0, self._unit, self._insertions, keys)

    def adopt(self, state: PoolState, resident: Container[Key]) -> None:
        self._unit, self._inverse = state.unit, 1.0 / state.unit
        self._insertions = state.inserted
        self._known.clear()
        self.clear()
        idle: list[Entry] = []
        for key, (score, number, used) in state.keys.items():
            standing = self._known[key] = _Standing(key)
            standing.score, standing.number = score, number
            if key in resident and used == state.now:
                self._recent.append(standing)
            elif key in resident:
                idle.append(standing.rest())
        self._idle.extend(idle)

    def keys(self) -> Iterable[Key]:
        return [standing.key for standing in self._recent] + [key for *_, key in self._idle.entries]


class _Standing:
    """One key's uses, and its place among the idle ones."""

    __slots__ = ("entry", "key", "number", "score")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.score = 0.0
        self.number = 0  # of its last insertion
        self.entry: Entry | None = None  # None: not idle

    def rest(self) -> Entry:
        """It becomes idle, with the score it has."""
        entry = self.entry = (self.score, self.number, self.key)
        return entry


class LFU:
    """Keys in the order of their uses, those of keys that left and came back included."""

    def __init__(self) -> None:
        self._uses: dict[Key, float] = {}  # of every key that ever had one
        self._insertions = 0
        self._entries: dict[Key, Entry] = {}  # of the resident keys
        self._ranking = Ranking()

    def step(self) -> None:
        pass

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._insertions += 1
            self._rank(key, weight, self._insertions)

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            entry = self._entries[key]
            self._ranking.remove(entry)
            self._rank(key, weight, entry[1])

    def _rank(self, key: Key, weight: float, number: int) -> None:
        uses = self._uses[key] = self._uses.get(key, 0.0) + weight
        entry = self._entries[key] = (uses, number, key)
        self._ranking.add(entry)

    def remove(self, key: Key) -> None:
        self._ranking.remove(self._entries.pop(key))

    def clear(self) -> None:
        self._entries.clear()
        self._ranking.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        return self._ranking.first(keep)

    def keys(self) -> Iterable[Key]:
        return self._entries


PROTECTED_SHARE = 0.8  # of the resident keys, at most; Karedla et al. found 0.6 to 0.8 best
SEGMENT = 1e9  # times: a protected key is worth more than any that is not


class SLRU:
    """Keys on probation and protected ones, each in the order of their last use."""

    def __init__(self) -> None:
        self._probation: OrderedDict[Key, int] = OrderedDict()
        self._protected: OrderedDict[Key, int] = OrderedDict()
        self._unused: set[Key] = set()  # came without being asked for: their next use is the first
        self._now = 0

    def step(self) -> None:
        self._now += 1

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._probation[key] = self._now
            if weight == 0:
                self._unused.add(key)

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            first = key in self._unused
            self._unused.discard(key)
            if key in self._protected or (weight >= 1 and not first):
                self._protect(key)
            else:  # a prompt's: recent, but not proven
                self._probation[key] = self._now
                self._probation.move_to_end(key)

    def _protect(self, key: Key) -> None:
        self._probation.pop(key, None)
        self._protected[key] = self._now
        self._protected.move_to_end(key)
        if len(self._protected) > PROTECTED_SHARE * len(self):
            oldest, used = self._protected.popitem(last=False)
            self._probation[oldest] = used

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def remove(self, key: Key) -> None:
        self._unused.discard(key)
        del (self._probation if key in self._probation else self._protected)[key]

    def clear(self) -> None:
        self._probation.clear()
        self._protected.clear()
        self._unused.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        for key, used in self._probation.items():
            if key not in keep:
                return 1.0 / (1 + self._now - used), key
        for key, used in self._protected.items():
            if key not in keep:
                return SEGMENT / (1 + self._now - used), key
        return None

    def keys(self) -> Iterable[Key]:
        return self._probation.keys() | self._protected.keys()


POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "slru": SLRU,
    "lfru": LFRU,
    "lfu": LFU,
    "fifo": FIFO,
}

KERNEL_POLICIES = ("lru", "fifo", "lfru")
