"""Keys in the order of their scores.

Knows: how to keep a sorted list sorted. Does not know: what a score means (`LFU`, `LFRU`).

Every operation moves some pointers in one list, which for a layer's keys, and for all layers'
some thousand, costs less than what a heap would have to keep in order about keys that left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable

from cache.policy import Key

Entry = tuple[float, int, Key]  # score, number of the insertion, key


class Ranking:
    """Lowest score first, the longer resident of equals first."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._order = sorted(entries)
        self.entries = {entry[2]: entry for entry in self._order}

    def add(self, entry: Entry) -> None:
        insort(self._order, entry)
        self.entries[entry[2]] = entry

    def extend(self, entries: list[Entry]) -> None:
        """Add many at once."""
        self._order += entries
        self._order.sort()
        self.entries.update({entry[2]: entry for entry in entries})

    def pop(self, key: Key) -> Entry:
        """Remove and return the entry of `key`."""
        entry = self.entries.pop(key)
        del self._order[bisect_left(self._order, entry)]
        return entry

    def clear(self) -> None:
        self._order.clear()
        self.entries.clear()

    def first(self, keep: Container[Key]) -> Key | None:
        for _, _, key in self._order:
            if key not in keep:
                return key
        return None
