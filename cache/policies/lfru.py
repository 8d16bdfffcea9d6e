"""Frequency and recency: how likely a key is asked for at its layer's next step.

Knows: uses that count half as much every `half_life` steps, and who was asked for at the last one.
Does not know: how scores are kept in order (`cache.policies.ranking`).

P(next) = repeats * [asked for at the last step] + (1 - repeats) * rate, the rate being the decayed
count over its sum of weights. Counts age without being touched: a use counts more the later it is.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from cache.policies.ranking import Ranking
from cache.policy import Key

HALF_LIFE = 16.0  # steps of a layer, that is tokens; docs/log.md compares others
REPEATS = 0.1  # more of them on models of few experts a layer would be wrong, see docs/log.md
MOST = 2.0**400  # what a use may count before all scores are scaled down


class LFRU:
    """Keys in the order of their decayed uses, those of keys that left included; what was used at
    the last step has a bonus until the next."""

    def __init__(self, half_life: float = HALF_LIFE, repeats: float = REPEATS) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._unit = 1.0  # what a use counts now
        self._bonus = repeats / (1.0 - repeats) / (1.0 - 1.0 / self._growth)  # in units
        self._scores: dict[Key, float] = {}  # of every key that ever had one
        self._insertions = 0
        self._recent: dict[Key, int] = {}  # used since the last step -> number of the insertion
        self._idle = Ranking()  # the other resident keys: their scores stay as they are

    def step(self) -> None:
        scores = self._scores
        self._idle.extend([(scores[key], number, key) for key, number in self._recent.items()])
        self._recent.clear()
        self._unit *= self._growth
        if self._unit > MOST:
            for key in scores:
                scores[key] /= self._unit
            self._unit = 1.0
            idle = self._idle.entries.items()
            self._idle = Ranking((scores[key], number, key) for key, (_, number, _) in idle)

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        scores, counted = self._scores, weight * self._unit
        for key in keys:
            self._insertions += 1
            scores[key] = scores.get(key, 0.0) + counted
            if weight:
                self._recent[key] = self._insertions
            else:
                self._idle.add((scores[key], self._insertions, key))

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        recent, scores, counted = self._recent, self._scores, weight * self._unit
        for key in keys:
            scores[key] += counted
            if key not in recent:
                _, recent[key], _ = self._idle.pop(key)

    def remove(self, key: Key) -> None:
        if self._recent.pop(key, None) is None:
            self._idle.pop(key)

    def clear(self) -> None:
        self._recent.clear()
        self._idle.clear()

    def first(self, keep: Container[Key]) -> Key | None:
        scores, bonus = self._scores, self._bonus * self._unit
        idle = self._idle.first(keep)
        if idle is not None and scores[idle] <= bonus:
            return idle
        recent = [key for key in self._recent if key not in keep]
        if not recent:
            return idle
        least = min(recent, key=scores.__getitem__)
        return least if idle is None or scores[least] + bonus < scores[idle] else idle

    def value(self, key: Key) -> float:
        score = self._scores[key] / self._unit
        return score + self._bonus if key in self._recent else score

    def keys(self) -> Iterable[Key]:
        return self._recent.keys() | self._idle.entries.keys()
