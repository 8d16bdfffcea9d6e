"""Rows as Markdown tables, CSV, JSON or JSON lines, written one by one, and as a picture."""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from offload.bench.compare import EarlierRun
from offload.bench.row import BenchRow, Test
from offload.options import LoadOptions
from offload.pictures import save_figure


def with_ratio(row: BenchRow, earlier: EarlierRun | None) -> dict[str, Any]:
    """The keys of `row`, and those of its ratio if there is an earlier run."""
    values = asdict(row)
    if earlier is not None:
        ratio = earlier.ratio(row)
        values["ratio"] = None if ratio is None else ratio.value
        values["ratio_error"] = None if ratio is None else ratio.error
    return values


def write_csv(rows: Iterable[BenchRow], out: TextIO, earlier: EarlierRun | None = None) -> None:
    """Every value in quotes, as llama-bench writes them, and without the samples."""
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for number, row in enumerate(rows):
        values = {k: v for k, v in with_ratio(row, earlier).items() if not isinstance(v, tuple)}
        if not number:
            writer.writerow(values)
        # llama-bench writes booleans as numbers, and nothing for what is missing.
        writer.writerow(int(v) if isinstance(v, bool) else v for v in values.values())
        out.flush()


def write_jsonl(rows: Iterable[BenchRow], out: TextIO, earlier: EarlierRun | None = None) -> None:
    """One object per line."""
    for row in rows:
        print(json.dumps(with_ratio(row, earlier)), file=out, flush=True)


def write_json(rows: Iterable[BenchRow], out: TextIO, earlier: EarlierRun | None = None) -> None:
    """An array, which is closed even if `rows` break off with an exception."""
    before = "["
    try:
        for row in rows:
            text = json.dumps(with_ratio(row, earlier), indent=2).replace("\n", "\n  ")
            print(f"{before}\n  {text}", end="", file=out, flush=True)
            before = ","
    finally:
        print("[]" if before == "[" else "\n]", file=out, flush=True)


WRITERS = {"csv": write_csv, "json": write_json, "jsonl": write_jsonl}

RATIO, SPEED = "0.00 ± 0.00", "000.00 ± 0.00"  # as wide as most values
NONE = "-"
DPI = 120


@dataclass(frozen=True)
class Column:
    """A heading and what stands below it, aligned to the right as numbers are, or to the left."""

    heading: str
    cell: Callable[[BenchRow], str]
    width: int = 0  # at least
    left: bool = False

    def width_for(self, rows: Sequence[BenchRow]) -> int:
        """Characters that the column needs for `rows`."""
        return max(len(self.heading), self.width, 3, *(len(self.cell(row)) for row in rows))


MODEL = (
    Column("model", lambda row: row.name, left=True),
    Column("size", lambda row: f"{row.model_size / 2**30:.2f} GiB"),
    Column("params", lambda row: f"{row.model_n_params / 1e9:.2f} B"),
    Column("backend", lambda row: row.backends, left=True),
)
POLICY = Column("policy", lambda row: row.policy, left=True)
LOOKAHEAD = Column("look-ahead", lambda row: row.lookahead_name, left=True)
SLOTS = Column("slots", lambda row: str(row.expert_slots))
EXPERTS = (
    SLOTS,
    Column("resident %", lambda row: f"{row.resident:.0%}"),
    Column("hit %", lambda row: f"{row.hit_rate:.1%}", 6),
    Column("MiB/token", lambda row: f"{row.mib_per_token:.1f}"),
    Column("link %", lambda row: f"{row.link_share:.0%}"),
)
DETAILS = (
    Column("first ms", lambda row: _ms(row.first_token_ns)),
    Column("p50 ms", lambda row: _ms(row.token_p50_ns)),
    Column("p95", lambda row: _ms(row.token_p95_ns)),
    Column("p99", lambda row: _ms(row.token_p99_ns)),
    Column("peak GiB", lambda row: f"{row.peak_memory / 2**30:.2f}"),
    Column("bound t/s", lambda row: f"{row.bound_ts:.1f}"),
    Column("reached", lambda row: f"{row.bound_share:.0%}"),
)


def _ms(ns: float | None) -> str:
    return NONE if ns is None else f"{ns / 1e6:.1f}"


class MarkdownTable:
    """A table that grows row by row, its columns as wide as the rows given first need."""

    def __init__(self, out: TextIO, columns: Sequence[Column], rows: Sequence[BenchRow]) -> None:
        self._out = out
        self._columns = [(column, column.width_for(rows)) for column in columns]
        self._write([column.heading for column in columns])
        self._write(["-" * w if c.left else "-" * (w - 1) + ":" for c, w in self._columns])

    def add(self, row: BenchRow) -> None:
        """Write `row` at the end."""
        self._write([column.cell(row) for column, _ in self._columns])

    def _write(self, cells: Sequence[str]) -> None:
        sized = zip(cells, self._columns, strict=True)
        texts = [cell.ljust(w) if c.left else cell.rjust(w) for cell, (c, w) in sized]
        print(f"| {' | '.join(texts)} |", file=self._out, flush=True)


def write_tables(
    rows: Iterable[BenchRow],
    out: TextIO,
    earlier: EarlierRun | None = None,
    *,
    tests: Sequence[Test],
    settings: Sequence[LoadOptions],
    columns: int | None = None,
) -> None:
    """Speed and experts, row by row; then times, memory and bounds in a second table.

    The second table is written even if `rows` break off with an exception. In a terminal of fewer
    `columns` than all this needs, a line above each table names the model in place of columns.
    """
    swept = [POLICY] if len({one.policy for one in settings}) > 1 else []
    swept += [LOOKAHEAD] if len({one.lookahead for one in settings}) > 1 else []
    width = max(len(test.name) for test in tests)
    test = Column("test", lambda row: row.test.name, width, left=True)
    speed = Column("t/s", lambda row: f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}", len(SPEED))
    main, details = [*swept, test, speed, *EXPERTS], [SLOTS, *swept, test, *DETAILS]
    if earlier is not None:
        ratio = earlier.ratio
        main.append(Column("vs before", lambda row: str(ratio(row) or NONE), len(RATIO)))
    written: list[BenchRow] = []
    narrow = False

    def begin(shown: Sequence[Column], part: Sequence[BenchRow], *, named: bool) -> MarkdownTable:
        if written:
            print(file=out)
        if named:
            print(", ".join(column.cell(part[0]) for column in MODEL), end="\n\n", file=out)
        return MarkdownTable(out, shown, part)

    try:
        for row in rows:
            if not written:
                needed = 1 + sum(column.width_for([row]) + 3 for column in (*MODEL, *main))
                narrow = columns is not None and needed > columns
            if not written or (narrow and row.name != written[-1].name):
                table = begin(main if narrow else [*MODEL, *main], [row], named=narrow)
            table.add(row)
            written.append(row)
    finally:
        parts = [list(part) for _, part in itertools.groupby(written, key=lambda row: row.name)]
        several = len(parts) > 1
        if several and not narrow:
            parts, details = [written], [MODEL[0], *details]
        for part in parts:
            table = begin(details, part, named=several and narrow)
            for row in part:
                table.add(row)


def save_picture(rows: Sequence[BenchRow], file: Path) -> None:
    """Draw a column of panels per test, tokens/s above hit rate, with a line for each setting.

    Raises `OffloadError` if `file` cannot be written.
    """
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(row.test.name for row in rows))
    figure = Figure(figsize=(1 + 4 * len(tests), 6), layout="constrained", dpi=DPI)
    panels = figure.subplots(2, len(tests), sharex=True, squeeze=False)
    lines: dict[str, None] = dict.fromkeys(_name(row) for row in rows)
    for at, test in enumerate(tests):
        speed, hits = panels[0][at], panels[1][at]
        for name in lines:
            chosen = [r for r in rows if r.test.name == test and _name(r) == name]
            chosen.sort(key=lambda row: row.resident)
            if chosen:
                resident = [100 * row.resident for row in chosen]
                rates, spreads = [r.avg_ts for r in chosen], [r.stddev_ts for r in chosen]
                style: dict[str, Any] = {"marker": "o", "label": name}
                if len(chosen) < 3:  # a line through two points would say what nobody measured
                    style["linestyle"] = "none"
                speed.errorbar(resident, rates, yerr=spreads, capsize=3, **style)
                hits.plot(resident, [100 * r.hit_rate for r in chosen], **style)
        speed.set_title(test)
        speed.set_ylim(bottom=0)
        hits.set_ylim(0, 102)
        hits.set_xlim(0, 102)
        hits.set_xlabel("resident experts, %")
    panels[0][0].set_ylabel("tokens/s")
    panels[1][0].set_ylabel("hit rate, %")
    if len(lines) > 1:
        panels[0][0].legend()
    model = rows[0].model
    figure.suptitle(model if len(lines) > 1 else f"{model}: {next(iter(lines))}")
    save_figure(figure, file)


def _name(row: BenchRow) -> str:
    """The settings of the row, without its number of expert slots."""
    return f"{row.bits}, {row.policy}, look-ahead {row.lookahead_name}"
