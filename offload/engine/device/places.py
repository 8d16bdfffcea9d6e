"""Where each part of the cache's state lies in two flat tensors, and by which rules it is used.

Knows: names and offsets. Does not know: tensors, kernels. A frozen value: kernels take it as a
constant.

Letters: L layers, E experts of the layer that has most, K experts a token, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

ALLOCATIONS = ("shared", "global")
COUNTS = (  # of `cache.statistics.LayerCounts`, in this order
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
HEADS = 8  # numbers about the whole cache


@dataclass(frozen=True)
class Places:
    """Offsets into `ints` (int64) and `reals` (float64)."""

    layers: int
    experts: int  # the most a layer has: keys are layer * experts + expert
    k: int
    slots: int
    policy: str
    allocation: str

    @property
    def lfru(self) -> bool:
        return self.policy == "lfru"

    @property
    def fifo(self) -> bool:
        return self.policy == "fifo"

    @property
    def shared(self) -> bool:
        return self.allocation == "shared"

    @property
    def keys(self) -> int:
        return self.layers * self.experts

    # ints: about the whole cache
    steps = 0  # steps of layers so far: what is in use bears the last one's number
    taken = 1  # slots that are not free any more: the first ones
    ordered = 2  # the highest number of a useless key
    useless_keys = 3
    halted = 4  # nothing is to be decided any more: the sequence is over

    # ints, by key
    slot_of = HEADS  # -1: not resident

    @property
    def number(self) -> int:
        return self.slot_of + self.keys  # place among equals: of the last use (LRU) or insertion

    @property
    def used(self) -> int:
        return self.number + self.keys  # the pool's step at the last use; LFRU: or -1

    # ints, by slot
    @property
    def key_in(self) -> int:
        return self.used + self.keys  # -1: none

    @property
    def in_use(self) -> int:
        return self.key_in + self.slots  # number of the step that names it

    @property
    def guessed(self) -> int:
        return self.in_use + self.slots  # 1: stays until its layer's step

    @property
    def useless(self) -> int:
        return self.guessed + self.slots  # loaded by a wrong guess: its place in the order; or 0

    # ints, by layer
    @property
    def now(self) -> int:
        return self.useless + self.slots  # steps of the pool

    @property
    def inserted(self) -> int:
        return self.now + self.layers  # the highest number given in the pool

    @property
    def guessing(self) -> int:
        return self.inserted + self.layers  # 1: a guess was made for the next step

    @property
    def guess(self) -> int:
        return self.guessing + self.layers  # [L, 3, K]: expert or -1, was absent, was loaded

    @property
    def tokens(self) -> int:
        return self.guess + self.layers * 3 * self.k

    @property
    def counters(self) -> int:
        return self.tokens + 1  # [L, COUNTS]

    @property
    def counts(self) -> int:
        return len(COUNTS)

    @property
    def ints(self) -> int:
        return self.counters + self.layers * self.counts

    # reals
    growth = 0  # of what a use counts, a step
    bonus = 1  # of what was used at the last step, in uses
    most = 2  # what a use may count
    heat_growth = 3
    pace = 4  # [L + 1], by layers until the giver is asked again

    @property
    def trust(self) -> int:
        return self.pace + self.layers + 1

    @property
    def unit(self) -> int:
        return self.trust + self.layers

    @property
    def inverse(self) -> int:
        return self.unit + self.layers  # 1 / unit

    @property
    def heat_unit(self) -> int:
        return self.inverse + self.layers

    @property
    def score(self) -> int:
        return self.heat_unit + self.layers

    @property
    def heat(self) -> int:
        return self.score + self.keys

    @property
    def worth(self) -> int:
        return self.heat + self.keys  # [S], while victims are chosen

    @property
    def reals(self) -> int:
        return self.worth + self.slots
