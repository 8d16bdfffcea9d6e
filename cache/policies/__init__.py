"""Eviction policies by name, one a file."""

from __future__ import annotations

from collections.abc import Callable

from cache.policies.fifo import FIFO
from cache.policies.lfru import LFRU
from cache.policies.lfu import LFU
from cache.policies.lru import LRU
from cache.policies.slru import SLRU
from cache.policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "slru": SLRU,
    "lfru": LFRU,
    "lfu": LFU,
    "fifo": FIFO,
}
