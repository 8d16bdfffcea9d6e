"""Frequency and recency: how likely a key is asked for at its layer's next step.

Knows: uses that count half as much every `half_life` steps, and who was asked for at the last one.
Does not know: how scores are kept in order (`cache.policies.ranking`).

P(next) = repeats * [asked for at the last step] + (1 - repeats) * rate, the rate being the decayed
count over its sum of weights. Counts age without being touched: a use counts more the later it is.

What a key is worth is one expression, `score * (1 / unit) + bonus`, in double precision: the
device-planned engine (`offload.device`) computes the same one for every slot, to the last bit.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from offload.cache.policies.ranking import Entry, Ranking
from offload.cache.policy import Key, KeyState, PoolState, Victim

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
