"""Rows as Markdown that a terminal shows well.

Knows: llama-bench's columns and ours, and what to leave out where they are too wide. Does not know:
what figures mean.

The first table grows row by row; what does not fit beside it comes in a second one at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from offload.bench.comparison import Earlier
from offload.bench.run import Row, Setting
from offload.bench.tests import Test

SPEED = "000.00 ± 0.00"  # as wide as most
NONE = "-"


@dataclass(frozen=True)
class Column:
    """A heading and what stands below it; numbers are set to the right."""

    name: str
    cell: Callable[[Row], str]
    width: int = 0
    left: bool = False

    def fit(self, rows: Sequence[Row]) -> int:
        return max(len(self.name), self.width, *(len(self.cell(row)) for row in rows), 3)


MODEL = (
    Column("model", lambda row: row.subject.name, left=True),
    Column("size", lambda row: f"{row.subject.model_size / 2**30:.2f} GiB"),
    Column("params", lambda row: f"{row.subject.model_n_params / 1e9:.2f} B"),
    Column("backend", lambda row: row.subject.backends, left=True),
)
POLICY = Column("policy", lambda row: row.subject.policy, left=True)
LOOKAHEAD = Column("look-ahead", lambda row: row.subject.lookahead_name, left=True)
SLOTS = Column("slots", lambda row: str(row.result.experts.slots))
EXPERTS = (
    SLOTS,
    Column("resident %", lambda row: f"{row.result.resident:.0%}"),
    Column("hit %", lambda row: f"{row.result.experts.counts.hit_rate:.1%}", 6),
    Column("MiB/token", lambda row: f"{row.result.experts.mib_per_token:.1f}"),
    Column("link %", lambda row: f"{row.result.link_share:.0%}"),
)
DETAILS = (
    Column("first ms", lambda row: _ms(row.result.first_token_ns)),
    Column("p50 ms", lambda row: _ms(row.result.token_ns[50])),
    Column("p95", lambda row: _ms(row.result.token_ns[95])),
    Column("p99", lambda row: _ms(row.result.token_ns[99])),
    Column("peak GiB", lambda row: f"{row.result.peak_memory / 2**30:.2f}"),
    Column("bound t/s", lambda row: f"{row.result.bound.tokens_per_s:.1f}"),
    Column("reached", lambda row: f"{row.result.bound_share:.0%}"),
)


def _ms(ns: float | None) -> str:
    return NONE if ns is None else f"{ns / 1e6:.1f}"


class TablePrinter:
    """Two tables: speed and experts, row by row; times, memory and bounds at the end."""

    def __init__(
        self,
        out: TextIO,
        tests: Sequence[Test],
        settings: Sequence[Setting],
        *,
        columns: int | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        """`columns`: of a terminal, None: as many as are needed."""
        self._out, self._room = out, columns
        width = max(len(test.name) for test in tests)
        test = Column("test", lambda row: row.result.test.name, width, left=True)
        swept = [
            column
            for column, values in (
                (POLICY, {s.policy for s in settings}),
                (LOOKAHEAD, {s.lookahead for s in settings}),
            )
            if len(values) > 1
        ]
        speed = Column("t/s", _speed, len(SPEED))
        self._main = [*swept, test, speed, *EXPERTS]
        if earlier is not None:
            self._main.append(
                Column("of before", lambda row: _ratio(earlier, row), len("0.00 ± 0.00"))
            )
        self._more = [SLOTS, *swept, test, *DETAILS]
        self._rows: list[Row] = []
        self._widths: list[int] = []

    def row(self, row: Row) -> None:
        columns = self._main if self._is_narrow(row) else [*MODEL, *self._main]
        if not self._rows or (columns is self._main and self._is_of_another_model(row)):
            self._begin(columns, [row])
        self._rows.append(row)
        self._line(columns, row)

    def end(self) -> None:
        models = {row.subject.name for row in self._rows}
        if not self._rows:
            return
        if len(models) == 1 or not self._is_narrow(self._rows[0]):
            parts = [self._rows]
            columns = [MODEL[0], *self._more] if len(models) > 1 else self._more
        else:
            columns = self._more
            parts = [
                list(part)
                for _, part in itertools.groupby(self._rows, key=lambda row: row.subject.name)
            ]
        for part in parts:
            self._begin(columns, part, named=len(parts) > 1)
            for row in part:
                self._line(columns, row)

    def _begin(
        self, columns: Sequence[Column], rows: Sequence[Row], *, named: bool | None = None
    ) -> None:
        """Headings wide enough for `rows`; above them what is not in a column."""
        if self._rows:
            self._print("")
        if columns is self._main if named is None else named:
            self._print(", ".join(column.cell(rows[0]) for column in MODEL) + "\n")
        self._widths = [column.fit(rows) for column in columns]
        self._head(columns)

    def _is_of_another_model(self, row: Row) -> bool:
        return row.subject.name != self._rows[-1].subject.name

    def _is_narrow(self, row: Row) -> bool:
        """Whether what all rows of a model share stands above them, once."""
        columns = [*MODEL, *self._main]
        needed = sum(column.fit([row]) + 3 for column in columns) + 1
        return self._room is not None and needed > self._room

    def _head(self, columns: Sequence[Column]) -> None:
        sized = list(zip(columns, self._widths, strict=True))
        names = [c.name.ljust(w) if c.left else c.name.rjust(w) for c, w in sized]
        self._print(f"| {' | '.join(names)} |")
        rules = ["-" * w if c.left else "-" * (w - 1) + ":" for c, w in sized]
        self._print(f"| {' | '.join(rules)} |")

    def _line(self, columns: Sequence[Column], row: Row) -> None:
        cells = [
            column.cell(row).ljust(width) if column.left else column.cell(row).rjust(width)
            for column, width in zip(columns, self._widths, strict=True)
        ]
        self._print(f"| {' | '.join(cells)} |")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def _speed(row: Row) -> str:
    return f"{row.result.avg_ts:.2f} ± {row.result.stddev_ts:.2f}"


def _ratio(earlier: Earlier, row: Row) -> str:
    ratio = earlier.ratio(row)
    return NONE if ratio is None else str(ratio)
