"""What is asked for again last leaves first: the optimum, for replays, which know the future.

Belady 1966; in a step that asks for several experts at once the rule is the same. It is a ceiling
for caches that load on demand and serve a step in one wave; look-ahead may pass it, and streaming
a prompt past the slots, which this one does not do.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from heapq import heappop, heappush
from itertools import count

from offload.cache.policy import Key, Victim

NEVER = 1 << 60


class Belady:
    """Keys in the order of their next use, the farthest first."""

    def __init__(self, future: Iterable[tuple[int, Iterable[int]]]) -> None:
        """`future`: layer and experts of every step to come, in order."""
        self._uses: dict[Key, list[int]] = {}  # times, the next one last
        times = count()
        for layer, experts in future:
            time = next(times)
            for expert in experts:
                self._uses.setdefault((layer, expert), []).append(time)
        for uses in self._uses.values():
            uses.reverse()
        self._resident: set[Key] = set()
        self._heap: list[tuple[int, Key]] = []  # (-next use, key); old entries stay until the top

    def step(self) -> None:
        pass

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._resident.add(key)
            self._use(key, weight)

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._use(key, weight)

    def _use(self, key: Key, weight: float) -> None:
        if weight:
            self._uses[key].pop()
        heappush(self._heap, (-self._next(key), key))

    def _next(self, key: Key) -> int:
        uses = self._uses.get(key)
        return uses[-1] if uses else NEVER

    def remove(self, key: Key) -> None:
        self._resident.discard(key)

    def clear(self) -> None:
        self._resident.clear()
        self._heap.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        kept: list[tuple[int, Key]] = []
        found: Victim | None = None
        while self._heap and found is None:
            negative, key = self._heap[0]
            if key not in self._resident or -negative != self._next(key):
                heappop(self._heap)
            elif key in keep:
                kept.append(heappop(self._heap))
            else:
                found = negative, key
        for entry in kept:
            heappush(self._heap, entry)
        return found

    def keys(self) -> Iterable[Key]:
        return self._resident
