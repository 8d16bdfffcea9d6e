"""Least recently used leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

from offload.cache.policy import Key, KeyState, PoolState, Victim


class LRU:
    """Keys in the order of their last use, with the step of it."""

    def __init__(self) -> None:
        self._used: OrderedDict[Key, int] = OrderedDict()
        self._now = 0

    def step(self) -> None:
        self._now += 1

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._used[key] = self._now

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._used[key] = self._now
            self._used.move_to_end(key)

    def remove(self, key: Key) -> None:
        del self._used[key]

    def clear(self) -> None:
        self._used.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        for key, used in self._used.items():
            if key not in keep:
                return 1.0 / (1 + self._now - used), key
        return None

    def keys(self) -> Iterable[Key]:
        return self._used

    def state(self) -> PoolState:
        keys = {
            key: KeyState(0.0, number, used)
            for number, (key, used) in enumerate(self._used.items(), start=1)
        }
        return PoolState(self._now, 1.0, len(keys), keys)

    def adopt(self, state: PoolState, resident: Container[Key]) -> None:
        self._now = state.now
        oldest_first = sorted(state.keys.items(), key=lambda item: item[1].number)
        self._used = OrderedDict((key, at.used) for key, at in oldest_first if key in resident)
