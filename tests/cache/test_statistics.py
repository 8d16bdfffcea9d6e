"""Counters add up, and are taken apart, field by field."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.statistics import Figures, LayerCounts, Statistics

whole = st.integers(0, 10**9)
# Multiples of 1/8 so that sums of seconds are exact.
counts = st.builds(
    LayerCounts,
    **{
        f.name: whole.map(lambda n: n / 8) if f.name == "wait_seconds" else whole
        for f in fields(LayerCounts)
    },
)


@settings(max_examples=50)
@given(a=counts, b=counts, c=counts)
def test_counts_add_and_subtract_field_by_field(
    a: LayerCounts, b: LayerCounts, c: LayerCounts
) -> None:
    assert astuple(a + b) == tuple(x + y for x, y in zip(astuple(a), astuple(b), strict=True))
    assert a + b - b == a
    assert (a + b) + c == a + (b + c)
    assert a + LayerCounts() == a
    assert a - a == LayerCounts()
    assert (a + b).loads == a.loads + b.loads


def test_adding_leaves_the_operands_alone() -> None:
    a, b = LayerCounts(requests=3, hits=1, misses=2), LayerCounts(requests=1, hits=1)
    assert a + b == LayerCounts(requests=4, hits=2, misses=2)
    assert a == LayerCounts(requests=3, hits=1, misses=2)
    assert b == LayerCounts(requests=1, hits=1)


def test_total_is_a_sum_that_later_counting_does_not_change() -> None:
    statistics = Statistics([LayerCounts() for _ in range(3)])
    statistics.layers[0].requests = 2
    statistics.layers[2].requests = 5
    total = statistics.total()
    statistics.layers[1].requests = 100
    assert total == LayerCounts(requests=7)


def test_total_of_one_layer_is_a_copy() -> None:
    statistics = Statistics([LayerCounts()])
    total = statistics.total()
    statistics.layers[0].hits += 1
    assert total.hits == 0


def test_rates_of_nothing_are_zero() -> None:
    nothing = LayerCounts()
    assert nothing.hit_rate == 0.0
    assert nothing.lookahead_precision == 0.0
    assert nothing.lookahead_recall == 0.0


def test_rates_are_shares() -> None:
    some = LayerCounts(
        requests=10,
        hits=4,
        misses=6,
        lookahead_guesses=8,
        lookahead_right=2,
        lookahead_asked=5,
        lookahead_loads=3,
        lookahead_loads_right=1,
    )
    assert some.hit_rate == pytest.approx(0.4)
    assert some.lookahead_precision == pytest.approx(0.25)
    assert some.lookahead_recall == pytest.approx(0.4)
    assert some.loads == 9
    assert some.useful_loads == 7


@dataclass(frozen=True)
class Runs(Figures):
    """Figures of one machine."""

    FIXED: ClassVar[frozenset[str]] = frozenset({"machine"})
    machine: str
    seconds: float
    layers: tuple[LayerCounts, ...]


def test_figures_add_and_subtract_field_by_field_and_the_fixed_ones_stay() -> None:
    earlier = Runs("a", 1.0, (LayerCounts(hits=1), LayerCounts(misses=2)))
    later = Runs("a", 4.5, (LayerCounts(hits=5), LayerCounts(misses=7)))
    between = later - earlier
    assert between == Runs("a", 3.5, (LayerCounts(hits=4), LayerCounts(misses=5)))
    assert earlier + between == later
