"""Replays, predictors and Belady's ceiling over made-up traces."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.cache.errors import CacheError
from offload.cache.guesses import PREDICTORS, Previous, Transitions, Union, merged
from offload.cache.policies import POLICIES
from offload.cache.trace.analysis import shapes, total
from offload.cache.trace.heatmap import collect
from offload.cache.trace.replay import BELADY, LIVE, Setup, recorded_setup, replay
from offload.cache.trace.trace import Event, Guess, Trace, TraceHeader

LAYERS, EXPERTS = 4, 6


def made_up(tokens: int, seed: int, guess: str = "none") -> Trace:
    """Sticky choices of two experts a layer; guesses for the next layer right, wrong or none."""
    chooser = random.Random(seed)
    last = [chooser.sample(range(EXPERTS), 2) for _ in range(LAYERS)]
    events = []
    for token in range(tokens):
        for layer in range(LAYERS):
            if chooser.random() < 0.5:
                last[layer] = chooser.sample(range(EXPERTS), 2)
        for layer in range(LAYERS):
            said: tuple[Guess, ...] = ()
            if guess != "none" and layer + 1 < LAYERS:
                right = last[layer + 1]
                wrong = [e for e in range(EXPERTS) if e not in right][:2]
                said = (Guess(layer + 1, tuple(right if guess == "right" else wrong)),)
            events.append(Event(layer, token == 0, (tuple(last[layer]),), guesses=said))
    header = TraceHeader("made up", (EXPERTS,) * LAYERS, 2, (10,) * LAYERS, {})
    return Trace(header, events)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), slots=st.integers(2, LAYERS * EXPERTS))
def test_no_policy_passes_belady(seed: int, slots: int) -> None:
    trace = made_up(30, seed)
    best = replay(trace, Setup(slots, BELADY)).counts.hits
    for policy in POLICIES:
        for allocation in ("shared", "global", "quota"):
            if allocation == "quota" and slots < 2 * LAYERS:
                continue  # steps in waves: another game, in which slots outlive their use
            outcome = replay(
                trace, Setup(slots, policy, allocation), lambda cache, _: cache.check_integrity()
            )
            assert outcome.counts.hits <= best
            assert outcome.bytes_loaded == outcome.counts.loads * 10


def test_belady_keeps_what_is_asked_for_soonest() -> None:
    rows = [(0,), (1,), (2,), (0,), (1,), (2,), (0,)]
    header = TraceHeader("one layer", (3,), 1, (1,))
    trace = Trace(header, [Event(0, False, (row,)) for row in rows])
    assert replay(trace, Setup(2, BELADY)).counts.hits == 2
    assert replay(trace, Setup(2, "lru")).counts.hits == 0


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), slots=st.integers(2, LAYERS * EXPERTS))
def test_wrong_guesses_cost_hardly_a_hit(seed: int, slots: int) -> None:
    without = replay(made_up(60, seed, "wrong"), Setup(slots)).counts
    wrong = replay(made_up(60, seed, "wrong"), Setup(slots, lookahead=LIVE)).counts
    assert wrong.lookahead_right == 0
    assert wrong.lookahead_loads <= 2 * LAYERS
    assert wrong.misses <= without.misses + wrong.lookahead_loads


def test_right_guesses_turn_misses_into_hits() -> None:
    without = replay(made_up(60, 1, "right"), Setup(10)).counts
    right = replay(made_up(60, 1, "right"), Setup(10, lookahead=LIVE)).counts
    assert right.lookahead_precision == right.lookahead_recall == 1
    assert right.misses < 0.6 * without.misses


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_every_predictor_replays_and_is_counted_layer_by_layer(predictor: str, ahead: int) -> None:
    trace = made_up(60, 2, "right")
    outcome = replay(trace, Setup(12, "lfru", "shared", predictor, ahead))
    assert outcome.layers[0].lookahead_guesses == 0
    assert all(counts.lookahead_guesses for counts in outcome.layers[1:])
    assert 0 < outcome.counts.lookahead_recall <= 1


def test_previous_says_what_the_token_before_chose() -> None:
    predictor = Previous(3)
    predictor.observe(1, (4, 2))
    predictor.observe(0, (7, 7))
    assert predictor.guess(0, 1) == [4, 2]
    assert predictor.guess(0, 2) == []


def test_transitions_say_what_followed_most_often() -> None:
    predictor = Transitions(3)
    for first, second in ((1, 5), (1, 5), (1, 3), (2, 4)):
        predictor.observe(0, (first,))
        predictor.observe(1, (second,))
    predictor.observe(0, (1,))
    assert predictor.guess(0, 1) == [5]
    predictor.observe(0, (2,))
    assert predictor.guess(0, 1) == [4]


def test_union_takes_turns_and_says_nothing_twice() -> None:
    assert merged([1, 2], [2, 3, 4]) == [1, 2, 3, 4]
    union = Union(Previous(2), Transitions(2))
    union.observe(0, (1,))
    union.observe(1, (2,))
    union.observe(0, (1,))
    assert union.guess(0, 1) == [2]


def test_shapes_count_repetitions_and_reuse() -> None:
    rows = [(0, 1), (1, 2), (1, 2), (0, 3)]
    events = [Event(0, True, ((5, 4),))] + [Event(0, False, (row,)) for row in rows]
    (shape,) = shapes(Trace(TraceHeader("x", (6,), 2, (1,)), events))
    assert (shape.tokens, shape.choices, shape.repeated) == (4, 8, 3)
    assert shape.hits_within(2) == 3 / 8
    assert shape.hits_within(3) == 4 / 8
    assert 3.5 < shape.effective_experts < 4
    recall = total(shapes(made_up(20, 3, "right")))
    assert recall.right[1] == recall.asked[1] > 0


@pytest.mark.parametrize(
    "setup",
    [
        {"slots": 0},
        {"policy": "best"},
        {"allocation": "fair"},
        {"lookahead": "oracle"},
        {"lookahead": "previous", "ahead": 4},
    ],
)
def test_setups_that_are_none_are_told(setup: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        Setup(**{"slots": 1, **setup})


def test_more_slots_than_experts_are_all_experts() -> None:
    trace = made_up(20, 3)
    everything = replay(trace, Setup(trace.header.total_experts))
    assert replay(trace, Setup(10**15)).counts == everything.counts


def test_a_trace_that_does_not_say_how_it_was_recorded_is_told() -> None:
    with pytest.raises(CacheError, match="slots"):
        recorded_setup(made_up(1, 0))


@pytest.mark.parametrize("slots", [4, 9, 16])
def test_the_optimum_stays_the_optimum_after_warm_starts_and_emptied_slots(slots: int) -> None:
    trace = made_up(40, 3)
    never = [(layer, expert) for layer, n in enumerate(trace.header.experts) for expert in range(n)]
    events = list(trace.events)
    for at in (0, len(events) // 2):
        events[at] = events[at]._replace(fresh=at > 0, warmed=tuple(never[:slots]))
    changed = Trace(trace.header, events)
    best = replay(changed, Setup(slots, BELADY)).counts
    assert best.warm_loads == 0
    cold = Trace(trace.header, [event._replace(warmed=()) for event in events])
    for policy in POLICIES:
        assert replay(cold, Setup(slots, policy)).counts.hits <= best.hits
        assert replay(changed, Setup(slots, policy)).counts.hits <= best.hits + 2 * slots
    drawn = collect(changed, Setup(slots))
    assert sum(map(sum, drawn.hits)) == replay(changed, Setup(slots)).counts.hits
