"""Which card gets which layers and how many expert slots, as arithmetic on bytes and counts.

Each card gets a range of decoder layers, so a hidden state crosses once from each card to the next.
The ranges maximise the room on the tightest card, measured in slots for each expert of its layers.
The reason is that cards work in turn and each caches its own layers, so a token waits for the
misses of all of them. The hit rate grows ever more slowly with the resident share, so a card that
gives room away loses more hits than another card gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf

from offload.errors import BudgetError
from offload.fit import Share
from offload.units import gib


@dataclass(frozen=True)
class Block:
    """One decoder layer: bytes of its dense weights and of its KV cache, and its number of
    experts."""

    dense: int
    kv_cache: int
    experts: int  # 0 in a layer without experts


@dataclass(frozen=True)
class Demand:
    """What a model needs, in bytes."""

    blocks: tuple[Block, ...]
    first: int  # weights before the layers, on the first card
    last: int  # weights after the layers, on the last card
    workspace: int  # on each card
    slot: int


def place(
    demand: Demand,
    available: Sequence[int],
    slots: int | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> tuple[Share, ...]:
    """Return every card's share, given the bytes `available` on each card.

    `slots` is the number of expert slots over all cards; None means as many as fit. `numbers` are
    the cards' numbers for messages; None means 0, 1, ... Raises `BudgetError`, which names the card
    with too little memory.
    """
    if len(available) > len(demand.blocks):
        raise BudgetError(
            f"{len(available)} cards for {len(demand.blocks)} layers: name fewer with --gpus"
        )
    room = _Room(demand, tuple(available), tuple(numbers or range(len(available))))
    cuts = _best_cuts(room)
    fit = [min(room.slots(card, *cut), room.experts(*cut)) for card, cut in enumerate(cuts)]
    experts = [room.experts(*cut) for cut in cuts]
    given = fit if slots is None else _divided(slots, experts, fit, room)
    return tuple(
        Share(
            room.numbers[card],
            range(*cut),
            sum(block.experts > 0 for block in demand.blocks[slice(*cut)]),
            experts[card],
            given[card],
            room.dense(card, *cut),
            room.kv_cache(*cut),
            demand.workspace,
        )
        for card, cut in enumerate(cuts)
    )


class _Room:
    """What a card would hold if it had the layers [begin, end)."""

    def __init__(
        self, demand: Demand, available: tuple[int, ...], numbers: tuple[int, ...]
    ) -> None:
        self.demand, self.available, self.numbers = demand, available, numbers
        self.cards, self.layers = len(available), len(demand.blocks)
        self._dense, self._kv_cache, self._experts = (
            _running([getattr(block, name) for block in demand.blocks])
            for name in ("dense", "kv_cache", "experts")
        )

    def dense(self, card: int, begin: int, end: int) -> int:
        ends = (card == 0) * self.demand.first + (card == self.cards - 1) * self.demand.last
        return self._dense[end] - self._dense[begin] + ends

    def kv_cache(self, begin: int, end: int) -> int:
        return self._kv_cache[end] - self._kv_cache[begin]

    def experts(self, begin: int, end: int) -> int:
        return self._experts[end] - self._experts[begin]

    def left(self, card: int, begin: int, end: int) -> int:
        """Bytes left for slots. A negative number means that even the rest does not fit."""
        fixed = self.dense(card, begin, end) + self.kv_cache(begin, end) + self.demand.workspace
        return self.available[card] - fixed

    def slots(self, card: int, begin: int, end: int) -> int:
        return max(0, self.left(card, begin, end) // self.demand.slot)

    def least(self, begin: int, end: int) -> int:
        """Bytes of the slots that the card needs at the very least: one slot if it has experts."""
        return self.demand.slot if self.experts(begin, end) else 0

    def fits(self, card: int, begin: int, end: int) -> bool:
        return self.left(card, begin, end) >= self.least(begin, end)

    def ampleness(self, card: int, begin: int, end: int) -> float:
        """Slots that fit for each expert, which may be more than one; -inf if the layers do not
        fit."""
        if not self.fits(card, begin, end):
            return -inf
        experts = self.experts(begin, end)
        return self.slots(card, begin, end) / experts if experts else inf


def _running(values: Sequence[int]) -> list[int]:
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _best_cuts(room: _Room) -> list[tuple[int, int]]:
    """Choose the range of layers of each card, at least one layer each. Raises `BudgetError`.

    Among the choices that leave the most room on the tightest card, take one with the most resident
    experts.
    """

    def last_begins(card: int, end: int) -> range:
        return range(card, end) if card else range(1)  # each card before has at least one layer

    @cache
    def tightest(card: int, end: int) -> float:
        """The room on the tightest of the cards 0 to `card`, at best, with the layers before
        `end`."""
        return max(
            min(tightest(card - 1, at) if card else inf, room.ampleness(card, at, end))
            for at in last_begins(card, end)
        )

    goal = tightest(room.cards - 1, room.layers)
    if goal == -inf:
        raise _too_little(room)

    @cache
    def resident(card: int, end: int) -> tuple[int, int]:
        """The most experts that can be resident if no card has less room than the goal, and the
        first layer of the last card."""
        best = (-1, 0)
        for at in last_begins(card, end):
            before = resident(card - 1, at)[0] if card else 0
            if before < 0 or room.ampleness(card, at, end) < goal:
                continue
            here = min(room.slots(card, at, end), room.experts(at, end))
            best = max(best, (before + here, at))
        return best

    cuts, end = [], room.layers
    for card in reversed(range(room.cards)):
        begin = resident(card, end)[1]
        cuts.append((begin, end))
        end = begin
    return cuts[::-1]


def _too_little(room: _Room) -> BudgetError:
    """Fill the cards one after the other, and return the error of the first that cannot hold a
    layer."""
    begin = 0
    for card in range(room.cards):
        rest = room.cards - 1 - card  # later cards, each of which needs a layer
        ends = (
            range(begin + 1, room.layers - rest + 1)
            if rest
            else range(room.layers, room.layers + 1)
        )
        fitting = [end for end in ends if room.fits(card, begin, end)]
        if not fitting:
            end = ends[0]
            break
        begin = fitting[-1]
    need = room.least(begin, end) + room.available[card] - room.left(card, begin, end)
    layers = f"layers {begin} to {end - 1}" if end - begin > 1 else f"layer {begin}"
    return BudgetError(
        f"card {room.numbers[card]} lacks {gib(need - room.available[card])}: {layers}, KV cache, "
        f"workspace and one expert slot need {gib(need)} and it has {gib(room.available[card])}: "
        "raise --vram, lower --ctx-size or --ubatch-size, or name more or larger cards with --gpus"
    )


def _divided(slots: int, experts: Sequence[int], fit: Sequence[int], room: _Room) -> list[int]:
    """Divide `slots` among the cards: the next slot always goes to the card with the smallest share
    of its experts resident, and no card gets more than `fit`."""
    given = [min(1, count) for count in experts]
    if slots < sum(given):
        raise BudgetError(
            f"{slots} expert slots on {len(experts)} cards: at least one is needed on each, raise "
            "--expert-slots"
        )
    wanted = min(slots, sum(experts))
    if wanted > sum(fit):
        held = ", ".join(f"{n} on card {room.numbers[card]}" for card, n in enumerate(fit))
        raise BudgetError(
            f"needs {wanted} expert slots of {gib(room.demand.slot)}, {sum(fit)} fit ({held}): "
            "lower --ctx-size, --ubatch-size, --expert-slots or --expert-bits, or raise --vram"
        )
    while sum(given) < wanted:
        _, least = min((n / experts[at], at) for at, n in enumerate(given) if n < fit[at])
        given[least] += 1
    return given
