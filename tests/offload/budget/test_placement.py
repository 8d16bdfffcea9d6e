"""Layers and slots over several cards: arithmetic, held against trying every way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload.budget.budget import Budget
from offload.budget.placement import Block, Demand, place
from offload.errors import BudgetError
from offload.fit import Share

GIB = 2**30
blocks = st.builds(
    Block, dense=st.integers(0, 40), kv_cache=st.integers(0, 20), experts=st.sampled_from((0, 4, 8))
)
demands = st.builds(
    Demand,
    blocks=st.lists(blocks, min_size=1, max_size=7).map(tuple),
    first=st.integers(0, 50),
    last=st.integers(0, 50),
    workspace=st.integers(0, 30),
    slot=st.integers(1, 12),
)
memories = st.lists(st.integers(20, 600), min_size=1, max_size=4)


def _placed(demand: Demand, available: list[int], slots: int | None = None) -> tuple[Share, ...]:
    try:
        return place(demand, available, slots)
    except BudgetError:
        assume(False)
        raise


def _ampleness(share: Share, slot: int, available: int) -> float:
    left = available - share.dense - share.kv_cache - share.workspace
    return left // slot / share.experts if share.experts else float("inf")


@given(demands, memories)
def test_every_layer_is_on_one_card_and_every_budget_is_held(
    demand: Demand, available: list[int]
) -> None:
    shares = _placed(demand, available)
    assert [layer for share in shares for layer in share.blocks] == list(range(len(demand.blocks)))
    assert sum(share.dense for share in shares) == demand.first + demand.last + sum(
        block.dense for block in demand.blocks
    )
    for share, memory in zip(shares, available, strict=True):
        assert len(share.blocks) >= 1
        used = share.dense + share.kv_cache + share.workspace + share.slots * demand.slot
        assert used <= memory
        assert min(1, share.experts) <= share.slots <= share.experts
        assert share.slots == share.experts or memory - used < demand.slot, "memory lies idle"


def _every_way(demand: Demand, available: list[int]) -> list[list[float]]:
    """How much room each card has, for all cuts that fit."""
    layers, cards, found = len(demand.blocks), len(available), []
    for cuts in combinations(range(1, layers), cards - 1):
        room = []
        for card, (begin, end) in enumerate(pairwise((0, *cuts, layers))):
            part = demand.blocks[begin:end]
            fixed = sum(block.dense + block.kv_cache for block in part) + demand.workspace
            fixed += (card == 0) * demand.first + (card == cards - 1) * demand.last
            experts = sum(block.experts for block in part)
            slots = (available[card] - fixed) // demand.slot
            if fixed > available[card] or (experts and slots < 1):
                break
            room.append(slots / experts if experts else float("inf"))
        else:
            found.append(room)
    return found


@given(demands, memories)
def test_no_other_cut_leaves_the_tightest_card_more_room(
    demand: Demand, available: list[int]
) -> None:
    ways = _every_way(demand, available)
    if not ways:
        with pytest.raises(BudgetError, match=r"memory on GPU \d|name fewer"):
            place(demand, available)
        return
    shares = place(demand, available)
    room = [_ampleness(s, demand.slot, m) for s, m in zip(shares, available, strict=True)]
    assert min(room) == max(map(min, ways))


@given(demands, memories, st.data())
def test_more_memory_never_leaves_a_card_with_a_smaller_least_share(
    demand: Demand, available: list[int], data: st.DataObject
) -> None:
    def least(memory: list[int]) -> float:
        shares = _placed(demand, memory)
        return min(s.slots / s.experts if s.experts else 1.0 for s in shares)

    card = data.draw(st.integers(0, len(available) - 1))
    more = [m + data.draw(st.integers(1, 200)) * (at == card) for at, m in enumerate(available)]
    assert least(more) >= least(available)


@given(demands, st.integers(20, 600))
def test_one_card_is_the_arithmetic_of_one_card(demand: Demand, memory: int) -> None:
    budget = Budget(
        memory,
        dense=demand.first + demand.last + sum(block.dense for block in demand.blocks),
        kv_cache=sum(block.kv_cache for block in demand.blocks),
        workspace=demand.workspace,
        slot=demand.slot,
        total_experts=sum(block.experts for block in demand.blocks),
    )
    assume(budget.total_experts)
    assert _slots_or_none(lambda: place(demand, [memory])[0].slots) == _slots_or_none(
        lambda: budget.slots(None)
    )


def _slots_or_none(count: Callable[[], int]) -> int | None:
    try:
        return count()
    except BudgetError:
        return None


@given(demands, memories, st.integers(1, 60))
def test_slots_asked_for_are_shared_out_evenly(
    demand: Demand, available: list[int], slots: int
) -> None:
    fit = [share.slots for share in _placed(demand, available)]
    shares = _placed(demand, available, slots)
    assert sum(s.slots for s in shares) == min(slots, sum(s.experts for s in shares))
    for share, most in zip(shares, fit, strict=True):
        assert min(1, share.experts) <= share.slots <= most
    # a card with a smaller share than another's last slot gave it is full
    for one, most in zip(shares, fit, strict=True):
        for other in shares:
            if one.experts and other.slots > 1 and one.slots < most:
                assert one.slots / one.experts >= (other.slots - 1) / other.experts


def _uniform(layers: int, experts: int, dense: int, slot: int) -> Demand:
    return Demand((Block(dense, GIB // 64, experts),) * layers, GIB // 2, GIB // 2, GIB // 2, slot)


def test_unequal_cards_get_layers_by_the_memory_that_experts_can_have() -> None:
    demand = _uniform(48, 128, 2**25, 5 * 2**19)
    large, small = place(demand, [20 * GIB, 10 * GIB])
    assert len(large.blocks) > 1.8 * len(small.blocks)
    assert abs(large.slots / large.experts - small.slots / small.experts) < 0.05


def test_what_one_card_lacks_is_said_with_the_flags_that_help() -> None:
    demand = _uniform(4, 8, GIB, 2**27)
    with pytest.raises(BudgetError) as error:
        place(demand, [4 * GIB, 2 * GIB])
    assert str(error.value) == (
        "not enough memory on GPU 1: 3.16 GiB needed for layers 2 to 3, KV cache, workspace and "
        "one expert slot, 2.00 GiB allowed: raise --vram, lower --ctx-size or --ubatch-size, or "
        "name more or larger GPUs with --gpus"
    )
    with pytest.raises(BudgetError, match="memory on GPU 2"):
        place(demand, [GIB, 40 * GIB], numbers=[2, 0])
    with pytest.raises(BudgetError, match="5 GPUs for 4 layers: name fewer with --gpus"):
        place(demand, [40 * GIB] * 5)


def test_slots_that_cannot_be_shared_out_are_refused() -> None:
    demand = _uniform(4, 8, 2**20, 2**27)
    with pytest.raises(BudgetError, match="1 expert slots for 2 GPUs: each needs at least one"):
        place(demand, [8 * GIB, 8 * GIB], 1)
    with pytest.raises(
        BudgetError, match=r"memory for 30 expert slots .* 22 fit \(.* on GPU 0, .*\): "
    ):
        place(demand, [5 * GIB // 2, 5 * GIB // 2], 30)


def test_a_hundred_layers_on_eight_cards_are_placed_at_once() -> None:
    shares = place(_uniform(100, 256, 2**24, 2**21), [8 * GIB + card * GIB for card in range(8)])
    assert sum(len(share.blocks) for share in shares) == 100


def test_a_share_reads_as_a_line() -> None:
    share = Share(3, range(12, 24), 12, 96, 40, 2 * GIB, 2**29, 0)
    assert share.line() == (
        "GPU 3: 12 layers, 40 of 96 experts in memory, plus 2.00 GiB of dense weights and "
        "512.0 MiB of KV cache"
    )
