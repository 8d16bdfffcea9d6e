"""A cache's state as values: to be taken to a GPU and back.

Knows: what decisions depend on. Does not know: how either side keeps it.
"""

from __future__ import annotations

from typing import NamedTuple

from offload.cache.policy import Key, PoolState


class HeatState(NamedTuple):
    """One layer's decayed uses."""

    unit: float
    uses: dict[int, float]  # by expert


class CacheState(NamedTuple):
    """Between two tokens: nothing is in use, nothing is guessed."""

    keys: tuple[Key | None, ...]  # by slot; None: free
    pools: tuple[PoolState, ...]  # of each layer, or one for all
    useless: tuple[Key, ...]  # first to leave, in order
    trust: tuple[float, ...]  # in each layer's guesses
    heat: tuple[HeatState, ...]  # of each layer
