"""Rows as Markdown that a terminal shows well.

Knows: llama-bench's columns and ours, and what to leave out where they are too wide. Does not know:
what figures mean.

The first table grows row by row; what does not fit beside it comes in a second one at the end.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from offload.bench.run import Row
from offload.bench.sample import Test
from offload.files import user_path
from offload.lines import printable
from offload.options import LoadOptions
from offload.quant.errors import OffloadError

# Rows are of the same measurement when these agree; of the others, more agreement is better.
SAME = ("model", "text", "n_prompt", "n_gen", "n_depth")
NEAR = ("backends", "bits", "policy", "lookahead", "expert_slots", "n_threads")
MOST_TOLD = 4  # rows, in a message
FIGURES = ("avg_ts", "stddev_ts")


@dataclass(frozen=True)
class Ratio:
    """This run's tokens/s over the earlier one's.

    The error is that of a quotient of two independent means, to first order: relative errors add
    in squares.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"

    @classmethod
    def of(cls, now: Row, then: dict[str, Any]) -> Ratio:
        mine, theirs = now.result, then
        value = mine.avg_ts / theirs["avg_ts"]
        shares = (mine.stddev_ts / mine.avg_ts, theirs["stddev_ts"] / theirs["avg_ts"])
        return cls(value, value * math.hypot(*shares))


@dataclass(frozen=True)
class Earlier:
    """The rows of an earlier run."""

    rows: tuple[dict[str, Any], ...]

    def ratio(self, row: Row) -> Ratio | None:
        """Beside the earlier row of the same test; None where there is none, or none is nearest.

        A row of other settings is taken when no other row of the test is as near: then the ratio
        tells what the settings do.
        """
        nearest = self._nearest(row)
        return Ratio.of(row, nearest[0]) if len(nearest) == 1 else None

    def why_none(self, row: Row) -> str:
        """Why `ratio` has none, which rows there are, and what to do; "" where it has one."""
        nearest, mine = self._nearest(row), row.to_json()
        if len(nearest) == 1:
            return ""
        if not nearest:
            there = _few(_told(then, SAME) for then in self.rows)
            return (
                f"nothing to compare with {_told(mine, SAME)}: the file has {there}; measure one "
                "of these (-p, -n, -pg, -d)"
            )
        unlike = [key for key in NEAR if len({str(then.get(key)) for then in nearest}) > 1]
        there = _few(_told(then, unlike) for then in nearest)
        return (
            f"{len(nearest)} rows are as near to {_told(mine, (*SAME, *unlike))} as each other: "
            f"{there or 'all alike'}; measure with one's settings, or leave one in the file"
        )

    def _nearest(self, row: Row) -> list[dict[str, Any]]:
        """Of the rows of the same test those that agree in most settings."""
        mine = row.to_json()
        same = [then for then in self.rows if all(then[key] == mine[key] for key in SAME)]
        near = [sum(then.get(key) == mine[key] for key in NEAR) for then in same]
        return [then for then, count in zip(same, near, strict=True) if count == max(near)]


def _told(row: dict[str, Any], keys: Iterable[str]) -> str:
    return " ".join(f"{key}={row.get(key)}" for key in keys)


def _few(texts: Iterable[str]) -> str:
    """Each once, and not more than fit into a line or two."""
    each = list(dict.fromkeys(text for text in texts if text))
    more = f" and {len(each) - MOST_TOLD} more" if len(each) > MOST_TOLD else ""
    return printable(" ".join("; ".join(each[:MOST_TOLD]).split())) + more


def read_earlier(file: str | Path) -> Earlier:
    """What `-o json` or `-o jsonl` wrote. Raises `OffloadError`."""
    try:
        text = user_path(file).read_text(encoding="utf-8")
        rows = _rows(text)
        for row in rows:
            _check(row)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OffloadError(
            f"cannot compare with {file} ({reason}): name what offload bench -o json wrote"
        ) from None
    return Earlier(tuple(rows))


def _rows(text: str) -> list[dict[str, Any]]:
    """Of an array, or of an object a line."""
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it has no rows")
    return list(rows)


def _check(row: dict[str, Any]) -> None:
    if missing := [key for key in (*SAME, *FIGURES) if key not in row]:
        raise ValueError(f"a row has no {missing[0]}")
    speed, spread = (row[key] for key in FIGURES)
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (speed, spread)):
        raise ValueError("a speed is no number")
    if speed <= 0 or spread < 0:
        raise ValueError("a speed is not above 0")


class Printer(Protocol):
    """Writes rows one by one."""

    def row(self, row: Row) -> None:
        """The next one."""

    def end(self) -> None:
        """There are no more, also because the run was broken off."""


@contextmanager
def ended(printer: Printer) -> Iterator[Printer]:
    """`printer`, ended whatever happens."""
    try:
        yield printer
    finally:
        printer.end()


def with_ratio(row: Row, earlier: Earlier | None) -> dict[str, Any]:
    """The row's keys; those of a ratio where there is something to compare with."""
    values = row.to_json()
    if earlier is not None:
        ratio = earlier.ratio(row)
        values["ratio"] = None if ratio is None else ratio.value
        values["ratio_error"] = None if ratio is None else ratio.error
    return values


class CsvPrinter:
    """Every value in quotes, no samples."""

    def __init__(self, out: TextIO, earlier: Earlier | None = None) -> None:
        self._out, self._earlier = out, earlier
        self._writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        self._begun = False

    def row(self, row: Row) -> None:
        values = with_ratio(row, self._earlier)
        named = {k: v for k, v in values.items() if not isinstance(v, list)}
        if not self._begun:
            self._writer.writerow(named)
            self._begun = True
        self._writer.writerow(_texts(named.values()))
        self._out.flush()

    def end(self) -> None:
        """Every row stands by itself."""


def _texts(values: Iterable[Any]) -> list[str]:
    """As llama-bench writes them: booleans as numbers, nothing for what there is not."""
    return [str(int(v)) if isinstance(v, bool) else "" if v is None else str(v) for v in values]


class JsonlPrinter:
    """An object a line."""

    def __init__(self, out: TextIO, earlier: Earlier | None = None) -> None:
        self._out, self._earlier = out, earlier

    def row(self, row: Row) -> None:
        print(json.dumps(with_ratio(row, self._earlier)), file=self._out, flush=True)

    def end(self) -> None:
        """Every row stands by itself."""


class JsonPrinter:
    """An array, closed also when the run is broken off."""

    def __init__(self, out: TextIO, earlier: Earlier | None = None) -> None:
        self._out, self._earlier = out, earlier
        self._begun = False

    def row(self, row: Row) -> None:
        text = json.dumps(with_ratio(row, self._earlier), indent=2).replace("\n", "\n  ")
        print(",\n" if self._begun else "[\n", text, sep="  ", end="", file=self._out, flush=True)
        self._begun = True

    def end(self) -> None:
        print("\n]" if self._begun else "[]", file=self._out, flush=True)


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
        settings: Sequence[LoadOptions],
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
