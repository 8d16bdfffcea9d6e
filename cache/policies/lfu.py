"""Least frequently used leaves first. For comparison: its counts never age."""

from __future__ import annotations

from collections.abc import Container, Iterable

from cache.policies.ranking import Ranking
from cache.policy import Key


class LFU:
    """Keys in the order of their uses, those of keys that left and came back included."""

    def __init__(self) -> None:
        self._uses: dict[Key, float] = {}  # of every key that ever had one
        self._insertions = 0
        self._ranking = Ranking()

    def step(self) -> None:
        pass

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._insertions += 1
            uses = self._uses[key] = self._uses.get(key, 0.0) + weight
            self._ranking.add((uses, self._insertions, key))

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            uses, number, _ = self._ranking.pop(key)
            uses = self._uses[key] = uses + weight
            self._ranking.add((uses, number, key))

    def remove(self, key: Key) -> None:
        self._ranking.pop(key)

    def clear(self) -> None:
        self._ranking.clear()

    def first(self, keep: Container[Key]) -> Key | None:
        return self._ranking.first(keep)

    def value(self, key: Key) -> float:
        return self._uses[key]

    def keys(self) -> Iterable[Key]:
        return self._ranking.entries
