"""What the cache says about one MoE layer's step, as values."""

from __future__ import annotations

from typing import NamedTuple

from offload.cache.policies import Key, PoolState


class Use(NamedTuple):
    """An expert to compute and the slot it is, or will be, in."""

    expert: int
    slot: int


class Wave(NamedTuple):
    """Experts that are in their slots at the same time: residents, and misses to load first."""

    hits: tuple[Use, ...]
    loads: tuple[Use, ...]


class Decision(NamedTuple):
    """How a layer's experts are served.

    Waves are carried out one after the other, since the loads of a later wave overwrite slots of an
    earlier one. Streamed experts come last: they are loaded beside the slots, used once, not kept.
    """

    layer: int
    waves: tuple[Wave, ...]
    streamed: tuple[int, ...] = ()


class HeatState(NamedTuple):
    """One layer's decayed uses."""

    unit: float
    uses: dict[int, float]  # by expert


class CacheState(NamedTuple):
    """All that decisions depend on between two tokens, when nothing is in use or guessed."""

    keys: tuple[Key | None, ...]  # by slot; None: free
    pools: tuple[PoolState, ...]  # of each layer
    useless: tuple[Key, ...]  # the first to leave, in order
    trust: tuple[float, ...]  # in each layer's guesses
    heat: tuple[HeatState, ...]  # of each layer
