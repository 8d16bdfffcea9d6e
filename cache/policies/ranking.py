"""Keys in the order of their scores.

Knows: how to keep a sorted list sorted. Does not know: what a score means (`LFU`, `LFRU`).

Every operation moves some pointers in one list, which for a layer's keys, and for all layers'
some thousand, costs less than what a heap would have to keep in order about keys that left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable

from offload.cache.policy import Key, Victim

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
