"""Synthetic traces: deterministic, of the right shape, with the locality asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.cache.trace.replay import Setup, replay
from offload.cache.trace.synthetic import MIXTRAL, SHAPES, Routing, synthesize
from offload.cache.trace.trace import CacheError, Trace


def hit_rate(trace: Trace, slots: int) -> float:
    return replay(trace, Setup(slots, "lru")).counts.hit_rate


def test_a_seed_decides_everything() -> None:
    routing = Routing(recall=0.8, seed=1)
    first = synthesize(MIXTRAL, routing, 5)
    assert synthesize(MIXTRAL, routing, 5).events == first.events
    assert synthesize(MIXTRAL, replace(routing, seed=2), 5).events != first.events


@pytest.mark.parametrize("name", SHAPES)
def test_every_token_chooses_k_of_each_layer(name: str) -> None:
    shape = SHAPES[name]
    trace = synthesize(shape, Routing(), 3, prompt_tokens=4)
    assert trace.tokens == 7
    assert trace.generated == 3
    for event in trace.events:
        for row in event.experts:
            assert len(set(row)) == shape.top_k
            assert all(0 <= expert < shape.experts for expert in row)


def test_sizes_are_those_of_the_models() -> None:
    # Mixtral 46.7 B, Qwen3 30.5 B, gpt-oss 116.8 B parameters with embeddings (cards and papers)
    for name, billions in (("mixtral", 46.7), ("qwen3-30b", 30.5), ("gpt-oss-120b", 116.8)):
        shape = SHAPES[name]
        experts = shape.record_bytes * 8 / shape.expert_bits * shape.layers * shape.experts
        assert experts + shape.dense_bytes / 2 == pytest.approx(billions * 1e9, rel=0.015)


def test_hits_of_the_paper() -> None:
    # arXiv 2312.17238, figure 2: about 40% at k=2 and 60% at k=4
    trace = synthesize(MIXTRAL, Routing(stickiness=0.25, skew=0.0), 150)
    assert hit_rate(trace, 2 * 32) == pytest.approx(0.40, abs=0.03)
    assert hit_rate(trace, 4 * 32) == pytest.approx(0.60, abs=0.03)


def test_stickiness_and_skew_raise_hits() -> None:
    shape = replace(MIXTRAL, layers=4)
    for low, high in (
        (Routing(stickiness=0.0, skew=0.0), Routing(stickiness=0.6, skew=0.0)),
        (Routing(stickiness=0.0, skew=0.0), Routing(stickiness=0.0, skew=1.5)),
    ):
        assert (
            hit_rate(synthesize(shape, high, 300), 8)
            > hit_rate(synthesize(shape, low, 300), 8) + 0.1
        )


def test_guesses_recall_what_was_asked() -> None:
    trace = synthesize(MIXTRAL, Routing(recall=0.85), 60)
    right = asked = 0
    for event, following in zip(trace.events, trace.events[1:], strict=False):
        for guess in event.guesses:
            assert guess.layer == event.layer + 1 == following.layer
            assert len(guess.experts) == 2
            right += len(set(guess.experts) & set(following.distinct()))
            asked += 2
    assert right / asked == pytest.approx(0.85, abs=0.02)


def test_a_probability_above_one_is_told() -> None:
    with pytest.raises(CacheError, match="stickiness 2"):
        Routing(stickiness=2)
