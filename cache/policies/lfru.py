"""Frequency and recency in one figure: uses that count half as much every `half_life` steps.

Knows: how to let counts age without touching them (a use counts more the later it is). Does not
know: how the lowest is found (`cache.policies.ranking`).
"""

from __future__ import annotations

from collections.abc import Iterator

from cache.policies.ranking import Ranking
from cache.policy import Key

HALF_LIFE = 16.0  # tokens; benchmarks/policies.py compares others
MOST = 2.0**400  # what a use may count before all scores are scaled down


class LFRU:
    """Keys in the order of their decayed uses, those of keys that left included."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._unit = 1.0  # what a use counts now
        self._ranking = Ranking()

    def step(self) -> None:
        self._unit *= self._growth
        if self._unit > MOST:
            scores = self._ranking.scores
            for key in scores:
                scores[key] /= self._unit
            self._unit = 1.0
            self._ranking.rebuild()

    def insert(self, key: Key, weight: float = 1.0) -> None:
        self.use(key, weight)
        self._ranking.insert(key)

    def use(self, key: Key, weight: float = 1.0) -> None:
        scores = self._ranking.scores
        scores[key] = scores.get(key, 0.0) + weight * self._unit

    def remove(self, key: Key) -> None:
        self._ranking.remove(key)

    def clear(self) -> None:
        self._ranking.clear()

    def victims(self) -> Iterator[Key]:
        return iter(self._ranking)

    def value(self, key: Key) -> float:
        return self._ranking.scores[key] / self._unit
