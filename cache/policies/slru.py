"""Segmented LRU (Karedla, Love, Wherry 1994): used once leaves before used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

from offload.cache.policy import Key, Victim

PROTECTED_SHARE = 0.8  # of the resident keys, at most; Karedla et al. found 0.6 to 0.8 best
SEGMENT = 1e9  # times: a protected key is worth more than any that is not


class SLRU:
    """Keys on probation and protected ones, each in the order of their last use."""

    def __init__(self) -> None:
        self._probation: OrderedDict[Key, int] = OrderedDict()
        self._protected: OrderedDict[Key, int] = OrderedDict()
        self._unused: set[Key] = set()  # came without being asked for: their next use is the first
        self._now = 0

    def step(self) -> None:
        self._now += 1

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            self._probation[key] = self._now
            if weight == 0:
                self._unused.add(key)

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        for key in keys:
            first = key in self._unused
            self._unused.discard(key)
            if key in self._protected or (weight >= 1 and not first):
                self._protect(key)
            else:  # a prompt's: recent, but not proven
                self._probation[key] = self._now
                self._probation.move_to_end(key)

    def _protect(self, key: Key) -> None:
        self._probation.pop(key, None)
        self._protected[key] = self._now
        self._protected.move_to_end(key)
        if len(self._protected) > PROTECTED_SHARE * len(self):
            oldest, used = self._protected.popitem(last=False)
            self._probation[oldest] = used

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def remove(self, key: Key) -> None:
        self._unused.discard(key)
        del (self._probation if key in self._probation else self._protected)[key]

    def clear(self) -> None:
        self._probation.clear()
        self._protected.clear()
        self._unused.clear()

    def first(self, keep: Container[Key]) -> Victim | None:
        for key, used in self._probation.items():
            if key not in keep:
                return 1.0 / (1 + self._now - used), key
        for key, used in self._protected.items():
            if key not in keep:
                return SEGMENT / (1 + self._now - used), key
        return None

    def keys(self) -> Iterable[Key]:
        return self._probation.keys() | self._protected.keys()
