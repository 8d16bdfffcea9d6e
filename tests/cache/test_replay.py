"""Replays and Belady's ceiling over made-up traces."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.trace.file import read, write
from offload.cache.trace.heatmap import collect
from offload.cache.trace.replay import BELADY, LIVE, REPLAYED, ROUTER, Setup, recorded_setup, replay
from offload.cache.trace.trace import (
    CacheError,
    CardSlots,
    Event,
    Guess,
    LayerShape,
    Trace,
    TraceHeader,
    shapes,
)

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
    for policy in REPLAYED:
        outcome = replay(trace, Setup(slots, policy), lambda cache, *_: cache.check_integrity())
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
    without = replay(made_up(60, seed, "wrong"), Setup(slots, "lru")).counts
    wrong = replay(made_up(60, seed, "wrong"), Setup(slots, "lru", LIVE)).counts
    assert wrong.lookahead_right == 0
    assert wrong.lookahead_loads <= 2 * LAYERS
    assert wrong.misses <= without.misses + wrong.lookahead_loads


def test_right_guesses_turn_misses_into_hits() -> None:
    without = replay(made_up(60, 1, "right"), Setup(10, "lru")).counts
    right = replay(made_up(60, 1, "right"), Setup(10, "lru", LIVE)).counts
    assert right.lookahead_precision == right.lookahead_recall == 1
    assert right.misses < 0.6 * without.misses


def test_routers_guesses_replay_whether_or_not_the_run_acted_on_them() -> None:
    trace = made_up(60, 2, "right")
    noted = [
        event._replace(guesses=tuple(guess._replace(live=False) for guess in event.guesses))
        for event in trace.events
    ]
    outcome = replay(Trace(trace.header, noted), Setup(12, "lfru", ROUTER))
    assert outcome.counts == replay(trace, Setup(12, "lfru", LIVE)).counts
    assert outcome.layers[0].lookahead_guesses == 0
    assert all(counts.lookahead_recall == 1 for counts in outcome.layers[1:])


def test_shapes_count_repetitions_and_reuse() -> None:
    rows = [(0, 1), (1, 2), (1, 2), (0, 3)]
    events = [Event(0, True, ((5, 4),))] + [Event(0, False, (row,)) for row in rows]
    (shape,) = shapes(Trace(TraceHeader("x", (6,), 2, (1,)), events))
    assert (shape.choices, shape.repeated) == (8, 3)
    assert shape.hits_within(2) == 3 / 8
    assert shape.hits_within(3) == 4 / 8
    assert 3.5 < shape.effective_experts < 4
    recall = sum(shapes(made_up(20, 3, "right")), LayerShape())
    assert recall.right[1] == recall.asked[1] > 0


@pytest.mark.parametrize(
    "setup",
    [
        {"slots": 0},
        {"policy": "best"},
        {"lookahead": "oracle"},
        {"cards": (CardSlots(2, 3),)},
    ],
)
def test_setups_that_cannot_be_are_refused(setup: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        Setup(**{"slots": 1, "policy": "lru", **setup})


def test_more_slots_than_experts_are_all_experts() -> None:
    trace = made_up(20, 3)
    everything = replay(trace, Setup(trace.header.total_experts, "lru"))
    assert replay(trace, Setup(10**15, "lru")).counts == everything.counts


def test_a_trace_that_does_not_say_how_it_was_recorded_is_refused() -> None:
    with pytest.raises(CacheError, match="slots"):
        recorded_setup(made_up(1, 0))


@pytest.mark.parametrize(
    "left",
    [{"policy": "slru"}, {"policy": "fifo"}, {"allocation": "quota"}, {"allocation": "global"}],
)
def test_a_trace_of_an_old_version_opens_and_replays_under_a_setup_that_is_named(
    left: dict[str, str], tmp_path: Path
) -> None:
    settings = {"slots": 8, "policy": "lfru", "allocation": "shared", "predictor": "union"}
    old = replace(made_up(20, 5).header, settings={**settings, "layers_ahead": 3, **left})
    write(tmp_path / "old", Trace(old, made_up(20, 5).events))
    trace = read(tmp_path / "old")
    assert trace.header == old
    with pytest.raises(CacheError, match="give --policy and --expert-slots"):
        recorded_setup(trace)
    assert replay(trace, Setup(8, "lfru")).counts.hits
    kept = replace(old, settings={**settings, "layers_ahead": 3})
    assert recorded_setup(Trace(kept, trace.events)) == Setup(8, "lfru", LIVE)


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
    for policy in REPLAYED:
        assert replay(cold, Setup(slots, policy)).counts.hits <= best.hits
        assert replay(changed, Setup(slots, policy)).counts.hits <= best.hits + 2 * slots
    drawn = collect(changed, Setup(slots, "lru"))
    assert sum(map(sum, drawn.hits)) == replay(changed, Setup(slots, "lru")).counts.hits
