"""Which resident expert leaves first.

Knows: the order of uses. Does not know: slots, nor which experts must stay (the caller asks for
victims in order and skips those).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

Key = tuple[int, int]  # (MoE layer, expert)


class Policy(Protocol):
    """Orders resident keys from first to leave to last."""

    def insert(self, key: Key) -> None:
        """`key` became resident."""

    def use(self, key: Key) -> None:
        """The resident `key` was asked for."""

    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""

    def clear(self) -> None:
        """Nothing is resident any more."""

    def victims(self) -> Iterator[Key]:
        """Resident keys, the one to evict first first. Not to be changed while iterating."""


class LRU:
    """Least recently used leaves first."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def insert(self, key: Key) -> None:
        self._order[key] = None

    def use(self, key: Key) -> None:
        self._order.move_to_end(key)

    def remove(self, key: Key) -> None:
        del self._order[key]

    def clear(self) -> None:
        self._order.clear()

    def victims(self) -> Iterator[Key]:
        return iter(self._order)


class LFU:
    """Least frequently used leaves first, the older of equals first. For comparison: counts never
    age."""

    def __init__(self) -> None:
        self._uses: dict[Key, int] = {}  # of every key ever resident
        self._resident: dict[Key, None] = {}

    def insert(self, key: Key) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        self._resident[key] = None

    def use(self, key: Key) -> None:
        self._uses[key] += 1

    def remove(self, key: Key) -> None:
        del self._resident[key]

    def clear(self) -> None:
        self._resident.clear()

    def victims(self) -> Iterator[Key]:
        return iter(sorted(self._resident, key=self._uses.__getitem__))


POLICIES: dict[str, type[LRU] | type[LFU]] = {"lru": LRU, "lfu": LFU}
