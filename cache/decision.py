"""What the cache says about one MoE layer's step, as values."""

from typing import NamedTuple


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
