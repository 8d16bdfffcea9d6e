"""Which card has which layers, and how many expert slots: arithmetic over several cards.

Knows: bytes and counts. Does not know: devices, models, tensors (`offload.blocks` counts a model's
bytes and carries a placement out).

A card has a range of decoder layers, so a hidden state crosses once from each card to the next. The
ranges are chosen so that the card where room is tightest has as much as it can have, counted in
slots for each expert of its layers. Cards work in turn and each caches its own layers, so a token
waits for the misses of all of them; hits grow ever slower with the share that is resident, so what
one card gives away costs more than another gains from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf

from offload.errors import BudgetError
from offload.options import Share
from offload.units import gib


@dataclass(frozen=True)
class Block:
    """One decoder layer: bytes of its weights outside the experts and of its KV cache; experts."""

    dense: int
    kv_cache: int
    experts: int  # 0: a layer without any


@dataclass(frozen=True)
class Demand:
    """What a model needs, in bytes."""

    blocks: tuple[Block, ...]
    first: int  # weights before the layers: on the first card
    last: int  # weights behind them: on the last card
    workspace: int  # on each card
    slot: int


def place(
    demand: Demand,
    available: Sequence[int],
    slots: int | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> tuple[Share, ...]:
    """Every card's share, given the bytes `available` on each; `slots` over all cards, None: as
    many as fit; `numbers`: what the cards are called, None: 0, 1, ...

    Raises `BudgetError`, which names the card that has too little.
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
    """Sums over layers [begin, end) as if they were on a card."""

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
        """Bytes for slots; less than 0: too little for the rest."""
        fixed = self.dense(card, begin, end) + self.kv_cache(begin, end) + self.demand.workspace
        return self.available[card] - fixed

    def slots(self, card: int, begin: int, end: int) -> int:
        return max(0, self.left(card, begin, end) // self.demand.slot)

    def least(self, begin: int, end: int) -> int:
        """Bytes of slots without which nothing can be computed."""
        return self.demand.slot if self.experts(begin, end) else 0

    def fits(self, card: int, begin: int, end: int) -> bool:
        return self.left(card, begin, end) >= self.least(begin, end)

    def ampleness(self, card: int, begin: int, end: int) -> float:
        """Slots that fit for each expert, more than one too; -inf: it does not fit."""
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
    """Ranges of layers for all cards, every card at least one layer. Raises `BudgetError`.

    Of those where the tightest card has the most room, one with the most experts resident.
    """

    def last_begins(card: int, end: int) -> range:
        return range(card, end) if card else range(1)  # one layer at least for each card before

    @cache
    def tightest(card: int, end: int) -> float:
        """The best that cards 0 to `card` can do with the layers before `end`."""
        return max(
            min(tightest(card - 1, at) if card else inf, room.ampleness(card, at, end))
            for at in last_begins(card, end)
        )

    goal = tightest(room.cards - 1, room.layers)
    if goal == -inf:
        raise _too_little(room)

    @cache
    def resident(card: int, end: int) -> tuple[int, int]:
        """The most experts resident with nowhere less room than the goal, and the last cut."""
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
    """Cards filled one after the other: the first at which that comes to nothing."""
    begin = 0
    for card in range(room.cards):
        rest = room.cards - 1 - card  # cards behind this one, which need a layer each
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
    """`slots` over the cards, to each next the card with the least share; `fit`: at most."""
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
