"""The expert cache: promises held over random runs, and each rule by example."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.cache import ExpertCache
from offload.cache.decision import Use, Wave
from offload.cache.eviction import LayerPools
from offload.cache.policies import LFRU, LRU
from offload.cache.trace.replay import REPLAYED, OnePool
from tests.cache.machine import DecideStep, LookAhead, Machine, Size, Step, Warm, runs
from tests.cache.naive import LFRU_HALF_LIFE, NaiveCache


def lru(slots: int, layers: int = 1) -> ExpertCache:
    return ExpertCache(slots, layers, LRU)


@settings(max_examples=300)
@given(run=runs())
def test_every_decision_computes_from_the_right_slots_whatever_happens(
    run: tuple[Size, list[Step]],
) -> None:
    size, steps = run
    machine = Machine(size)
    for step in steps:
        machine.do(step)


@settings(max_examples=50)
@given(run=runs())
def test_two_caches_given_the_same_calls_decide_the_same(run: tuple[Size, list[Step]]) -> None:
    size, steps = run
    one, other = Machine(size), Machine(size)
    for step in steps:
        one.do(step)
        other.do(step)
    assert one.decisions == other.decisions
    assert one.resident() == other.resident()
    assert one.cache.statistics.layers == other.cache.statistics.layers


@settings(max_examples=50)
@given(run=runs(breaks=False))
def test_with_room_for_all_each_expert_is_loaded_once(run: tuple[Size, list[Step]]) -> None:
    size, steps = run
    roomy = Size(size.layers * size.experts + 1, size.layers, size.experts, size.policy)
    machine = Machine(roomy)
    for step in steps:
        machine.do(step)
    assert max(Counter(machine.loaded).values(), default=1) == 1
    assert machine.cache.statistics.total().evictions == 0
    for decision in machine.decisions:
        if hasattr(decision, "waves"):
            assert len(decision.waves) <= 1


@settings(max_examples=50)
@given(experts=st.lists(st.integers(0, 20), unique=True), policy=st.sampled_from(sorted(REPLAYED)))
def test_one_slot_is_enough_for_any_decision(experts: list[int], policy: str) -> None:
    machine = Machine(Size(slots=1, layers=2, experts=21, policy=policy))
    machine.do(DecideStep(1, (7,)))
    machine.do(DecideStep(0, tuple(experts)))
    machine.do(DecideStep(1, tuple(reversed(experts))))
    *_, decision = machine.decisions
    assert len(decision.waves) == len(experts)


@pytest.mark.parametrize("pools", [LayerPools, OnePool])
@pytest.mark.parametrize("policy", sorted(REPLAYED))
@settings(max_examples=40)
@given(
    slots=st.integers(1, 6),
    layers=st.integers(1, 3),
    requests=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
            st.booleans(),
        ),
        min_size=10,
        max_size=30,
    ),
)
def test_cache_decides_as_a_naive_model_does(
    policy: str,
    pools: type[LayerPools],
    slots: int,
    layers: int,
    requests: list[tuple[int, list[int], bool]],
) -> None:
    make = REPLAYED[policy] if policy != "lfru" else functools.partial(LFRU, LFRU_HALF_LIFE, 0.5)
    cache = ExpertCache(slots, layers, make, pools)
    model = NaiveCache(slots, layers, policy, pools is OnePool)
    for layer, experts, prompt in requests:
        layer %= layers
        experts = experts[:slots]  # no waves
        hits, loads = model.decide(layer, experts, prompt)
        (wave,) = cache.decide(layer, experts, prompt=prompt).waves
        assert list(wave.hits) == hits
        assert list(wave.loads) == loads
        assert set(cache.table.keys()) == set(model.slot_of)
        cache.check_integrity()


def test_decision_of_no_experts_has_no_waves() -> None:
    assert lru(2).decide(0, ()).waves == ()


def test_evicts_least_recent_unpinned_slot() -> None:
    cache = lru(3)
    cache.decide(0, (0,))
    cache.decide(0, (1,))
    cache.decide(0, (2,))
    cache.decide(0, (0, 3))  # 0 is the oldest but in use, so 1 leaves
    assert [e for e in range(4) if cache.is_resident(0, e)] == [0, 2, 3]
    cache.check_integrity()


def test_what_does_not_fit_beside_the_hits_waits_for_a_later_wave() -> None:
    cache = lru(2)
    cache.decide(0, (0, 1))
    decision = cache.decide(0, (2, 0, 3, 1, 4))
    first, second, third = decision.waves
    assert {use.expert for use in first.hits} == {0, 1}
    assert first.loads == ()
    assert [use.expert for use in second.loads] == [2, 3]
    assert [use.expert for use in third.loads] == [4]
    assert cache.statistics.total().evictions == 3


def test_wave_keeps_slots_that_the_next_one_does_not_need() -> None:
    cache = lru(3)
    cache.decide(0, (0, 1, 2, 3))
    assert cache.is_resident(0, 3)
    assert sum(cache.is_resident(0, expert) for expert in range(3)) == 2
    cache.check_integrity()


def test_layers_used_in_turn_keep_their_experts() -> None:
    """Plain LRU would miss every time: the key to evict is the one needed next."""
    layers = 4
    cache = lru(layers, layers)
    for token in range(8):
        for layer in range(layers):
            cache.decide(layer, (token // 4,))  # each layer stays with an expert for four tokens
    assert cache.statistics.total().misses == 2 * layers


def test_a_layer_that_changes_its_experts_takes_slots_of_one_that_does_not_use_its_own() -> None:
    cache = lru(4, layers=2)
    cache.decide(0, (0, 1, 2))
    for token in range(4):
        cache.decide(0, (0,))
        cache.decide(1, (token % 3,))
    assert [e for e in range(3) if cache.is_resident(1, e)] == [0, 1, 2]
    assert [e for e in range(3) if cache.is_resident(0, e)] == [0]


def test_look_ahead_turns_a_miss_into_a_hit_and_is_counted() -> None:
    cache = lru(4, layers=2)
    cache.decide(0, (0,))
    loads = cache.look_ahead(1, (5, 6), most=2)
    assert [use.expert for use in loads] == [5, 6]
    (wave,) = cache.decide(1, (5, 7)).waves
    assert wave.hits == (loads[0],)
    assert [use.expert for use in wave.loads] == [7]
    counts = cache.statistics.layers[1]
    assert (counts.requests, counts.hits, counts.misses) == (2, 1, 1)
    assert (counts.lookahead_guesses, counts.lookahead_loads) == (2, 2)
    assert (counts.lookahead_right, counts.lookahead_asked) == (1, 2)
    assert counts.lookahead_loads_right == 1
    assert counts.useful_loads == 2
    assert counts.lookahead_precision == 0.5
    assert counts.lookahead_recall == 0.5


def test_a_guess_is_compared_with_one_step_only() -> None:
    cache = lru(4, layers=2)
    cache.look_ahead(1, (0,), most=1)
    cache.decide(1, (0,))
    cache.decide(1, (0,))
    assert cache.statistics.layers[1].lookahead_asked == 1


def test_right_guess_that_was_resident_is_not_a_right_load() -> None:
    cache = lru(4, layers=2)
    cache.decide(1, (5,))
    cache.look_ahead(1, (5, 6), most=2)
    cache.decide(1, (5,))
    counts = cache.statistics.layers[1]
    assert (counts.lookahead_right, counts.lookahead_loads_right) == (1, 0)
    assert (counts.loads, counts.useful_loads) == (2, 1)


def test_look_ahead_never_evicts_what_the_present_decision_uses() -> None:
    cache = lru(2, layers=2)
    cache.decide(0, (0, 1))
    assert cache.look_ahead(1, (0, 1), most=2) == ()
    assert cache.is_resident(0, 0)
    assert cache.is_resident(0, 1)


def test_look_ahead_loads_no_more_than_it_may() -> None:
    cache = lru(8, layers=2)
    assert [use.expert for use in cache.look_ahead(1, (3, 1, 2), most=2)] == [3, 1]
    assert cache.look_ahead(1, (4, 5), most=0) == ()


def test_look_ahead_leaves_a_slot_that_a_decision_can_have_at_once() -> None:
    cache = lru(3, layers=2)
    assert len(cache.look_ahead(1, (0, 1, 2, 3), most=4)) == 2
    (wave, *_) = cache.decide(0, (0, 1)).waves
    assert len(wave.loads) == 1


def test_one_slot_is_never_given_to_look_ahead() -> None:
    assert lru(1, layers=2).look_ahead(1, (0,), most=1) == ()


def test_guess_is_not_evicted_before_its_step_and_is_the_first_to_leave_when_it_was_wrong() -> None:
    cache = lru(2, layers=2)
    (ahead,) = cache.look_ahead(1, (0,), most=1)
    for expert in range(4):
        cache.decide(0, (expert,))
        assert cache.table.slot_of((1, 0)) == ahead.slot
    (wave,) = cache.decide(1, (1,)).waves
    assert wave.loads == (Use(1, ahead.slot),)
    assert cache.is_resident(0, 3)


def test_what_a_guess_loaded_is_kept_before_other_residents_when_it_is_guessed_again() -> None:
    cache = lru(2, layers=2)
    cache.look_ahead(1, (0,), most=1)
    cache.warm(1, 2)
    cache.look_ahead(1, (2, 0), most=0)  # one slot must stay free to decide with
    cache.decide(0, (0,))
    assert cache.is_resident(1, 0)


def test_guesses_evict_only_after_they_proved_right() -> None:
    cache = lru(2, layers=2)
    for expert in (0, 1):
        cache.decide(0, (expert,))
    assert cache.look_ahead(1, (0,), most=1) == (), "unproven, and no slot is free"
    cache.decide(1, (0,))
    cache.decide(0, (1,))
    assert len(cache.look_ahead(1, (1,), most=1)) == 1, "proven"


def test_wrong_guesses_lose_the_right_to_load_and_right_ones_win_it_back() -> None:
    cache = lru(6, layers=2)
    assert len(cache.look_ahead(1, (7,), most=1)) == 1, "a free slot"
    for _ in range(20):
        cache.decide(1, (0,))
        assert cache.look_ahead(1, (8,), most=1) == ()
    for expert in range(1, 40):
        cache.look_ahead(1, (expert,), most=1)
        cache.decide(1, (expert,))
        cache.decide(0, (0,))
    assert len(cache.look_ahead(1, (99,), most=1)) == 1


def test_a_nearer_guess_replaces_a_farther_one() -> None:
    cache = lru(6, layers=3)
    cache.decide(0, (0,))
    cache.look_ahead(2, (4, 5), most=2)
    cache.decide(1, (0,))
    assert [use.expert for use in cache.look_ahead(2, (5, 6), most=2)] == [6]
    cache.decide(2, (5, 6))
    counts = cache.statistics.layers[2]
    assert (counts.lookahead_guesses, counts.lookahead_right) == (2, 2)
    assert (counts.lookahead_loads, counts.lookahead_loads_right) == (3, 2)
    cache.check_integrity()


def test_warm_start_fills_free_slots_only_and_is_neither_hit_nor_miss() -> None:
    cache = lru(2)
    assert cache.warm(0, 0) == Use(0, 0)
    assert cache.warm(0, 0) is None
    assert cache.warm(0, 1) is not None
    assert cache.warm(0, 2) is None
    cache.decide(0, (0, 3))
    counts = cache.statistics.total()
    assert (counts.requests, counts.hits, counts.misses, counts.warm_loads) == (2, 1, 1, 2)
    cache.check_integrity()


def test_guessed_resident_is_kept_for_the_step_that_will_ask_for_it() -> None:
    cache = lru(2, layers=3)
    cache.decide(1, (0,))
    cache.decide(2, (0,))
    cache.look_ahead(1, (0,), most=1)  # would otherwise be the first to leave
    cache.decide(0, (0,))
    assert cache.is_resident(1, 0)
    assert not cache.is_resident(2, 0)


def test_look_ahead_does_not_evict_a_guess_to_load_another() -> None:
    cache = lru(3, layers=2)
    cache.look_ahead(1, (2,), most=1)
    cache.decide(1, (2,))  # the first to leave, and a guess that proved right
    cache.decide(0, (0,))
    cache.decide(0, (1,))
    loads = cache.look_ahead(1, (3, 2), most=2)
    assert [use.expert for use in loads] == [3], "2 was there already"


@settings(max_examples=100)
@given(
    policy=st.sampled_from(sorted(REPLAYED)),
    slots=st.integers(2, 6),
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=8, max_size=20),
    guesses=st.lists(st.integers(0, 3), unique=True),
)
def test_look_ahead_keeps_every_guess_that_is_resident(
    policy: str, slots: int, asked: list[tuple[int, int]], guesses: list[int]
) -> None:
    machine = Machine(Size(slots, layers=2, experts=4, policy=policy))
    for layer, expert in asked:
        machine.do(DecideStep(layer, (expert,)))
    known = {expert for expert in guesses if machine.cache.is_resident(1, expert)}
    loads = machine.look_ahead(1, tuple(guesses), most=4)
    assert all(machine.cache.is_resident(1, expert) for expert in known)
    assert known.isdisjoint(use.expert for use in loads), "evicted and loaded again"


def test_emptied_cache_loads_again_and_keeps_its_counts() -> None:
    cache = lru(2)
    cache.decide(0, (0, 1))
    cache.forget()
    assert not cache.is_resident(0, 0)
    (wave,) = cache.decide(0, (0, 1)).waves
    assert len(wave.loads) == 2
    assert cache.statistics.total().evictions == 0
    cache.check_integrity()


def test_failed_step_leaves_a_cache_that_goes_on() -> None:
    machine = Machine(Size(slots=3, layers=2, experts=6))
    for step in (
        DecideStep(0, (0, 1)),
        LookAhead(1, (2,), 1),
        DecideStep(1, (2, 3, 4, 5), fails_after=1),
        DecideStep(1, (2, 3, 4, 5)),
        Warm(1, 0),
        DecideStep(0, (0, 1)),
    ):
        machine.do(step)


def test_decision_is_made_of_plain_values() -> None:
    decision = lru(2).decide(0, (4,))
    assert decision.waves == (Wave(hits=(), loads=(Use(expert=4, slot=0),)),)
    assert hash(decision) == hash((0, (((), ((4, 0),)),), ()))


def test_with_fewer_slots_it_begins_anew_and_keeps_its_counts() -> None:
    cache = lru(6, layers=2)
    for layer in (0, 1):
        cache.decide(layer, (0, 1, 2))
    cache.resize(2)
    cache.check_integrity()
    assert cache.table.slots == 2
    assert not cache.is_resident(0, 0)
    decision = cache.decide(0, (0, 1, 2))
    assert {use.slot for wave in decision.waves for use in wave.loads} <= {0, 1}
    cache.check_integrity()
    assert cache.statistics.total().misses == 9
