"""Longest resident leaves first: what a cache does that does not watch uses. For comparison."""

from __future__ import annotations

from collections.abc import Iterable

from offload.cache.policies.lru import LRU
from offload.cache.policy import Key


class FIFO(LRU):
    """LRU in which only becoming resident counts as a use."""

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        pass
