"""Least frequently used leaves first. For comparison: its counts never age."""

from __future__ import annotations

from collections.abc import Iterator

from cache.policies.ranking import Ranking
from cache.policy import Key


class LFU:
    """Keys in the order of their uses, those of keys that left and came back included."""

    def __init__(self) -> None:
        self._ranking = Ranking()

    def step(self) -> None:
        pass

    def insert(self, key: Key, weight: float = 1.0) -> None:
        self._count(key, weight)
        self._ranking.insert(key)

    def use(self, key: Key, weight: float = 1.0) -> None:
        self._count(key, weight)

    def _count(self, key: Key, weight: float) -> None:
        scores = self._ranking.scores
        scores[key] = scores.get(key, 0.0) + weight

    def remove(self, key: Key) -> None:
        self._ranking.remove(key)

    def clear(self) -> None:
        self._ranking.clear()

    def victims(self) -> Iterator[Key]:
        return iter(self._ranking)

    def value(self, key: Key) -> float:
        return self._ranking.scores[key]
