"""Counters, per MoE layer and in all, and figures that add and subtract."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self


class Figures:
    """For dataclasses of what happened in some time.

    `a + b` sums two stretches of time, and `later - earlier` is what happened between two moments.
    Tuples are added element by element. The fields named in `FIXED` say whose figures these are and
    keep their values.
    """

    FIXED: ClassVar[frozenset[str]] = frozenset()

    def __add__(self, other: Self) -> Self:
        return self._with(operator.add, other)

    def __sub__(self, other: Self) -> Self:
        return self._with(operator.sub, other)

    def _with(self, operate: Callable[[Any, Any], Any], other: Self) -> Self:
        mine, theirs = vars(self), vars(other)
        new = {at: _each(operate, mine[at], theirs[at]) for at in mine.keys() - self.FIXED}
        return type(self)(**{**mine, **new})


def _each(operate: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(operate(a, b) for a, b in zip(one, other, strict=True))
    return operate(one, other)


@dataclass
class LayerCounts(Figures):
    """What happened at one MoE layer (or, summed, at all of them).

    `hits + misses == requests`. `loads` are misses, look-ahead loads, warm loads and wrong early
    loads, without those that were dropped.
    """

    requests: int = 0  # distinct experts asked for, summed over steps
    hits: int = 0  # were in a slot, or on their way to one
    misses: int = 0  # had to be loaded while the step waited
    streamed: int = 0  # of the misses, those that got no slot
    early_loads: int = 0  # begun for a prompt before its router was asked
    early_loads_right: int = 0  # of these, those that were misses then
    evictions: int = 0
    lookahead_guesses: int = 0  # experts guessed, resident or not
    lookahead_right: int = 0  # guesses that the layer then asked for
    lookahead_loads: int = 0  # guesses that were loaded
    lookahead_loads_right: int = 0  # of these, those the layer then asked for
    lookahead_asked: int = 0  # requests in steps that had guesses
    warm_loads: int = 0  # experts that were hot in an earlier run
    dropped: int = 0  # loads given up before their copy began
    wait_seconds: float = 0.0  # compute stood still for a load

    @property
    def loads(self) -> int:
        ahead = self.early_loads_wrong + self.lookahead_loads + self.warm_loads
        return self.misses + ahead - self.dropped

    @property
    def early_loads_wrong(self) -> int:
        return self.early_loads - self.early_loads_right

    @property
    def loads_beside(self) -> int:
        """Loads that got no slot."""
        return self.streamed + self.early_loads_wrong

    @property
    def useful_loads(self) -> int:
        """Loads that were of use: misses, and right guesses."""
        return self.misses + self.lookahead_loads_right

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    @property
    def lookahead_precision(self) -> float:
        """Of the experts guessed, how many were asked for."""
        return self.lookahead_right / self.lookahead_guesses if self.lookahead_guesses else 0.0

    @property
    def lookahead_recall(self) -> float:
        """Of the experts asked for where there was a guess, how many were guessed."""
        return self.lookahead_right / self.lookahead_asked if self.lookahead_asked else 0.0

    def decisions(self) -> LayerCounts:
        """These counts without those of waiting and of early loads, which a replay cannot have."""
        return replace(self, early_loads=0, early_loads_right=0, dropped=0, wait_seconds=0.0)


@dataclass
class Statistics:
    """What was counted at each MoE layer."""

    layers: list[LayerCounts]

    def total(self) -> LayerCounts:
        """A sum that later counting does not change."""
        return sum(self.layers, LayerCounts())
