"""Eviction policies by name, one a file."""

from __future__ import annotations

from collections.abc import Callable

from offload.cache.policies.fifo import FIFO
from offload.cache.policies.lfru import LFRU
from offload.cache.policies.lfu import LFU
from offload.cache.policies.lru import LRU
from offload.cache.policies.slru import SLRU
from offload.cache.policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "slru": SLRU,
    "lfru": LFRU,
    "lfu": LFU,
    "fifo": FIFO,
}
