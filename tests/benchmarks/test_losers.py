"""What lost against the product's policies and its router still runs beside them."""

from __future__ import annotations

import pytest

from benchmarks.losers import (
    FIFO,
    PREDICTORS,
    SLRU,
    Guesser,
    Previous,
    QuotaCache,
    Transitions,
    Union,
    merged,
)
from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision
from offload.cache.policies import LRU, Policy
from offload.cache.sharded import Cache
from offload.cache.trace.replay import Setup, replay_with
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.cache.trace.trace import Event

SHAPE = Shape("tiny", 5, 8, 2, record_bytes=1000, dense_bytes=0, expert_bits=4.5)


@pytest.mark.parametrize("policy", [FIFO, SLRU])
def test_a_policy_that_lost_runs_a_cache(policy: type[Policy]) -> None:
    trace = synthesize(SHAPE, Routing(), 40)
    cache = ExpertCache(14, SHAPE.layers, policy)
    setup = Setup(14, "lru")
    replay_with(trace, cache, setup, lambda _: (), lambda cache, *_: cache.check_integrity())
    assert cache.statistics.total().hits > 0


@pytest.mark.parametrize("slots", [10, 12])
def test_a_quota_gives_no_layer_more_than_its_share(slots: int) -> None:
    trace = synthesize(SHAPE, Routing(), 40)
    cache = QuotaCache(slots, SHAPE.layers, LRU)

    def check(_: Cache, event: Event, __: Decision) -> None:
        cache.check_integrity()
        for layer in range(SHAPE.layers):
            held = sum(cache.is_resident(layer, expert) for expert in range(SHAPE.experts))
            assert held <= max(1, slots // SHAPE.layers + (layer < slots % SHAPE.layers))

    replay_with(trace, cache, Setup(slots, "lru"), lambda _: (), check)
    assert len(cache.table) == slots


def test_slru_protects_what_was_used_twice() -> None:
    policy = SLRU()
    policy.insert([(0, 0), (0, 1), (0, 2)], [0, 1, 2])
    policy.step()
    policy.use([(0, 0)])
    policy.step()
    policy.insert([(0, 3)], [3])
    left = []
    while (victim := policy.first([(0, expert) for expert in left])) is not None:
        left.append(victim[2][1])
    assert left == [1, 2, 3, 0]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_every_predictor_replays_and_is_counted_layer_by_layer(predictor: str, ahead: int) -> None:
    trace = synthesize(SHAPE, Routing(recall=0.9), 60)
    cache = ExpertCache(12, SHAPE.layers, FIFO)
    guesser = Guesser(predictor, ahead, SHAPE.layers)
    replay_with(trace, cache, Setup(12, "lru"), guesser)
    layers = cache.statistics.layers
    assert layers[0].lookahead_guesses == 0
    assert all(counts.lookahead_guesses for counts in layers[1:])
    assert 0 < cache.statistics.total().lookahead_recall <= 1


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
