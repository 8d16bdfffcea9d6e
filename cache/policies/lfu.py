"""Least frequently used leaves first. For comparison: its counts never age."""

from __future__ import annotations

from collections.abc import Container, Iterable

from offload.cache.policies.ranking import Entry, Ranking
from offload.cache.policy import Key, Victim


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
