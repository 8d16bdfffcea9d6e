"""Rows beside the slots that streamed experts pass through, and the order of a plan's loads.

Knows: that two halves of the rows take turns: one is filled while the other is computed from. Does
not know: how many rows a device has room for, nor what fills them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cache.plan import Plan, Use, Wave


class Step(NamedTuple):
    """What to begin to load, and what to compute then; what is computed was begun in this step or
    in the one before."""

    begin: tuple[Use, ...]
    hits: tuple[Use, ...]
    loads: tuple[Use, ...]


class Staging:
    """`rows` rows, the first numbered `first`, each `apart` from the one before; none, or at least
    two."""

    def __init__(self, first: int, rows: int, apart: int = 1) -> None:
        if rows < 0 or rows == 1:
            raise ValueError(f"staging takes two rows or more, or none, not {rows}")
        self.rows = rows
        self._first, self._apart = first, apart
        self._half = rows // 2
        self._second = False  # half, whose turn is next

    def steps(self, plan: Plan) -> list[Step]:
        """A plan in order. What is streamed is begun a step early: its rows are free, while a wave
        takes over the slots of the one before."""
        if not plan.streamed:
            return [Step(wave.loads, wave.hits, wave.loads) for wave in plan.waves]
        batches = self._batches(plan.streamed)
        order = [*plan.waves, *(Wave((), batch) for batch in batches)]
        begin = [wave.loads for wave in plan.waves]
        if not begin:
            begin.append(batches.pop(0))
        begin[-1] += batches.pop(0) if batches else ()
        begin += batches
        begin += [()] * (len(order) - len(begin))
        return [Step(early, *wave) for early, wave in zip(begin, order, strict=True)]

    def _batches(self, experts: Sequence[int]) -> list[tuple[Use, ...]]:
        """`experts` cut into what fits a half, the halves in turn."""
        assert self._half, "streamed without staging"
        cut = []
        for at in range(0, len(experts), self._half):
            row = self._first + self._apart * self._half * self._second
            some = experts[at : at + self._half]
            cut.append(tuple([Use(expert, row + self._apart * i) for i, expert in enumerate(some)]))
            self._second = not self._second
        return cut
