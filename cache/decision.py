"""What one MoE layer's step does, as values.

Knows: the shape of a decision. Does not know: how it was reached (`cache.cache`) or is carried out.
"""

from __future__ import annotations

from typing import NamedTuple

from offload.cache.policies import Key, PoolState


class Use(NamedTuple):
    """An expert to compute and the slot it is, or will be, in."""

    expert: int
    slot: int


class Wave(NamedTuple):
    """Experts whose slots are valid together: resident ones, and ones to load first."""

    hits: tuple[Use, ...]
    loads: tuple[Use, ...]


class Decision(NamedTuple):
    """Waves to carry out one after the other: a later wave's loads overwrite an earlier one's
    slots. Then what is streamed: loaded beside the slots, used once, and not kept."""

    layer: int
    waves: tuple[Wave, ...]
    streamed: tuple[int, ...] = ()


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
