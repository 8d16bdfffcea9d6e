"""Keys in the order of scores that only grow.

Knows: how to find the lowest score without sorting. Does not know: what a score means (`LFU`,
`LFRU`).

A heap holds one entry a key with the score it had when the entry was made. Scores only grow, so an
entry is never too high: one that reaches the top with an old score is put back with the present
one. A use therefore costs no work on the heap.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace

from cache.policy import Key

Entry = tuple[float, int, Key]  # score, number of the insertion, key


class Ranking:
    """Resident keys, lowest score first, the longer resident of equals first."""

    def __init__(self) -> None:
        self.scores: dict[Key, float] = {}  # of every key that ever had one
        self._inserted: dict[Key, int] = {}  # resident key -> number of its insertion
        self._heap: list[Entry] = []
        self._insertions = 0

    def __len__(self) -> int:
        return len(self._inserted)

    def insert(self, key: Key) -> None:
        self._insertions += 1
        self._inserted[key] = self._insertions
        heappush(self._heap, (self.scores[key], self._insertions, key))
        if len(self._heap) > 4 * len(self._inserted) + 64:  # mostly keys that left
            self.rebuild()

    def remove(self, key: Key) -> None:
        del self._inserted[key]  # its entry is dropped when it reaches the top

    def clear(self) -> None:
        self._inserted.clear()
        self._heap.clear()

    def rebuild(self) -> None:
        """Make the heap anew: scores were changed other than by growing."""
        self._heap = [(self.scores[key], number, key) for key, number in self._inserted.items()]
        heapify(self._heap)

    def __iter__(self) -> Iterator[Key]:
        heap, taken = self._heap, list[Entry]()
        inserted, scores = self._inserted, self.scores
        try:
            while heap:
                entry = heap[0]
                score, number, key = entry
                if inserted.get(key) != number:
                    heappop(heap)
                elif score != scores[key]:
                    heapreplace(heap, (scores[key], number, key))
                else:
                    heappop(heap)
                    taken.append(entry)
                    yield key
        finally:
            for entry in taken:
                if inserted.get(entry[2]) == entry[1]:
                    heappush(heap, entry)
