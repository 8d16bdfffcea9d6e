"""Where each part of the cache's state lies in two flat tensors.

Letters: L layers, E experts of the layer that has most, K experts a token, S slots. A key is the
number layer * E + expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

COUNTS = (  # fields of `cache.statistics.LayerCounts`, in the order in which they are counted
    "requests",
    "hits",
    "misses",
    "evictions",
    "lookahead_guesses",
    "lookahead_right",
    "lookahead_loads",
    "lookahead_loads_right",
    "lookahead_asked",
)


@dataclass(frozen=True)
class Places:
    """Sizes of a cache, and with them the offset of every part of `ints` (int64) and `reals`
    (float64): `places.key_in` is where the part "key_in" begins.

    The value is frozen, so kernels take it as a constant.
    """

    layers: int  # L
    experts: int  # E
    k: int  # K
    slots: int  # S
    policy: str  # lfru or lru

    @property
    def lfru(self) -> bool:
        return self.policy == "lfru"

    @property
    def keys(self) -> int:
        return self.layers * self.experts

    @property
    def counts(self) -> int:
        return len(COUNTS)

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Where each part of `ints` and of `reals` lies in its tensor."""
        ints = (
            ("steps", 1),  # of layers so far; a key in use bears the number of the last one
            ("taken", 1),  # slots that are not free any more, which are the first ones
            ("ordered", 1),  # the highest number given to a useless key
            ("halted", 1),  # not 0: the sequence is over and nothing is to be decided any more
            ("slot_of", self.keys),  # -1: not resident
            ("used", self.keys),  # its layer's step at the last use, or -1
            ("key_in", self.slots),  # -1: no key
            ("in_use", self.slots),  # the number of the step that used it last
            ("guessed", self.slots),  # 1: it stays until its layer's next step
            ("useless", self.slots),  # its place among keys loaded by a wrong guess, or 0
            ("now", self.layers),  # steps of the layer
            ("guessing", self.layers),  # 1: a guess was made for the layer's next step
            ("guess", self.layers * 3 * self.k),  # [L, 3, K]: expert or -1, was absent, was loaded
            ("tokens", 1),
            ("counters", self.layers * self.counts),  # [L, COUNTS]
        )
        reals = (
            ("growth", 1),  # of what a use counts, a step
            ("bonus", 1),  # what a use at the last step is worth, in uses
            ("most", 1),  # what a use may count before scores are scaled down
            ("heat_growth", 1),
            ("pace", self.layers + 1),  # [L + 1], by layers until the owner of a slot is asked
            ("trust", self.layers),
            ("unit", self.layers),  # what a use counts now
            ("inverse", self.layers),  # 1 / unit
            ("heat_unit", self.layers),
            ("score", self.keys),
            ("heat", self.keys),
            ("worth", self.slots),  # while victims are chosen
        )
        found = {}
        for whole, parts in (("ints", ints), ("reals", reals)):
            begin = 0
            for name, length in parts:
                found[name] = slice(begin, begin + length)
                begin += length
            found[whole] = slice(begin, begin)  # so that `places.ints` is how many there are
        return found

    def __getattr__(self, name: str) -> int:
        """The offset of the part called `name`."""
        if name.startswith("_") or name not in self.parts:
            raise AttributeError(f"there is no part {name!r}")
        begin: int = self.parts[name].start
        return begin
