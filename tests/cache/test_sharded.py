"""One cache a card behind the interface of one: the same decisions as each card's cache alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision
from offload.cache.policies import POLICIES
from offload.cache.sharded import ShardedCache, card_and_row, divided
from offload.cache.staging import staging_of
from offload.cache.trace.replay import BELADY, Setup, card_trace, recorded_setup, replay
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.cache.trace.trace import CacheError, CardSlots, Trace, cards_text

EXPERTS = 6
SHAPE = Shape("tiny", 5, 8, 2, record_bytes=1000, dense_bytes=0, expert_bits=4.5)
steps = st.lists(
    st.tuples(
        st.sampled_from(("decide", "guess", "warm")),
        st.integers(0, 4),
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4, unique=True),
    ),
    max_size=40,
)


def _caches() -> list[ExpertCache]:
    return [ExpertCache(3, 2, POLICIES["lru"]), ExpertCache(7, 3, POLICIES["lru"])]


def _slots(decision: Decision) -> list[tuple[int, int]]:
    return [tuple(use) for wave in decision.waves for use in (*wave.hits, *wave.loads)]


@given(steps)
def test_a_card_decides_as_its_cache_alone_would(
    calls: list[tuple[str, int, list[int]]],
) -> None:
    whole, alone = ShardedCache(_caches()), _caches()
    for kind, layer, experts in calls:
        card, local = (0, layer) if layer < 2 else (1, layer - 2)
        if kind == "decide":
            decision, expected = whole.decide(layer, experts), alone[card].decide(local, experts)
            assert decision.layer == layer
            assert [(e, card_and_row(s, 2)) for e, s in _slots(decision)] == [
                (e, (card, row)) for e, row in _slots(expected)
            ]
        elif kind == "guess":
            uses = whole.look_ahead(layer, experts, 2)
            expected_uses = alone[card].look_ahead(local, experts, 2)
            assert [(e, card_and_row(s, 2)) for e, s in uses] == [
                (e, (card, row)) for e, row in expected_uses
            ]
        else:
            use, expected_use = whole.warm(layer, experts[0]), alone[card].warm(local, experts[0])
            assert (use is None) == (expected_use is None)
        whole.check_integrity()
        for expert in range(EXPERTS):
            resident = whole.is_resident(layer, expert)
            assert resident == alone[card].is_resident(local, expert)
    assert len(whole.table) == sum(len(cache.table) for cache in alone)
    assert whole.statistics.layers == [c for cache in alone for c in cache.statistics.layers]
    parts = [cache.heat.of(at, 1) for cache in alone for at in range(len(cache.heat.layers))]
    assert [whole.heat.of(layer, 1) for layer in range(5)] == parts


def test_slots_keep_their_numbers_and_tell_who_is_in_them() -> None:
    whole = ShardedCache(_caches())
    assert whole.table.slots == 10
    used = {
        use.slot: (layer, use.expert)
        for layer in range(5)
        for use in whole.decide(layer, [1]).waves[0].loads
    }
    assert len(used) == 5, "a slot of two cards has two numbers"
    for slot, key in used.items():
        assert whole.table.key_in(slot) == key
    assert whole.table.has_free()
    whole.forget()
    assert len(whole.table) == 0
    assert whole.table.key_in(next(iter(used))) is None


def test_one_card_numbers_its_slots_as_they_are() -> None:
    one, alone = (make() for make in (_one_card, lambda: ExpertCache(4, 2, POLICIES["lru"])))
    for layer, experts in ((0, [1, 2]), (1, [0, 5]), (0, [3]), (1, [1])):
        assert one.decide(layer, experts) == alone.decide(layer, experts)


def _one_card() -> ShardedCache:
    return ShardedCache([ExpertCache(4, 2, POLICIES["lru"])])


def _trace(cards: str | None = None) -> Trace:
    trace = synthesize(SHAPE, Routing(recall=0.8), 30)
    settings = {"slots": 14, "policy": "lfru", "allocation": "shared", "cards": cards}
    return replace(trace, header=replace(trace.header, settings=settings))


@pytest.mark.parametrize("policy", ["lru", "lfru", BELADY])
def test_a_replay_of_two_cards_is_that_of_their_layers_apart(policy: str) -> None:
    trace, cards = _trace(), (CardSlots(2, 8), CardSlots(3, 6))
    both = replay(trace, Setup(14, policy, cards=cards))
    apart = [
        replay(card_trace(trace, first, end), Setup(slots, policy))
        for first, end, slots in ((0, 2, 8), (2, 5, 6))
    ]
    assert both.layers == tuple(counts for part in apart for counts in part.layers)


def test_a_trace_says_what_each_card_had() -> None:
    cards = (CardSlots(2, 8), CardSlots(3, 6))
    assert recorded_setup(_trace(cards_text(cards))).cards == cards
    assert recorded_setup(_trace()).cards == ()


@pytest.mark.parametrize("text", ["2:8", "2:8,3", "x", "2:8,2:6", "2:8,3:0", "5:14,0:0", "2:8,3:7"])
def test_cards_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(CacheError, match="GPUs"):
        recorded_setup(_trace(text))


def test_each_card_streams_through_rows_of_its_own() -> None:
    staging = staging_of(ShardedCache(_caches()), 2)
    for layer, (card, first) in enumerate([(0, 3), (0, 3), (1, 7), (1, 7), (1, 7)]):
        decision = Decision(layer, (), (1, 2, 3))
        rows = [
            card_and_row(use.slot, 2)
            for step in staging[layer].steps(decision)
            for use in step.begin
        ]
        assert len(rows) == 3
        assert {at for at, _ in rows} == {card}
        assert {row for _, row in rows} == {first, first + 1}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.data())
def test_fewer_slots_are_shared_out_in_proportion(had: list[int], data: st.DataObject) -> None:
    slots = data.draw(st.integers(len(had), sum(had)))
    given_back = divided(slots, had)
    assert sum(given_back) == slots
    for now, before in zip(given_back, had, strict=True):
        assert 1 <= now <= before
        assert abs(now - before * slots / sum(had)) < len(had) + 1


def test_a_resized_cache_has_fewer_rows_on_each_card() -> None:
    cache = ShardedCache(_caches())
    cache.decide(3, [1, 2])
    cache.resize(5)
    assert [part.table.slots for part in cache.caches] == [1, 4]
    assert len(cache.table) == 0
    cache.decide(0, [1])
    cache.check_integrity()


@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=6, unique=True))
def test_what_is_streamed_is_said_in_the_layer_of_the_model(experts: list[int]) -> None:
    whole, (_, alone) = ShardedCache(_caches()), _caches()
    decision = whole.decide(3, experts, prompt=True, admit=1)
    expected = alone.decide(1, experts, prompt=True, admit=1)
    assert decision.layer == 3
    assert decision.streamed == expected.streamed
    assert [(e, card_and_row(s, 2)) for e, s in _slots(decision)] == [
        (e, (1, row)) for e, row in _slots(expected)
    ]
