"""Rows as csv, json and jsonl, each written as soon as it is known.

Knows: llama-bench's shapes of these, and that what was written stands when a run is broken off.
Does not know: tables (`table`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from offload.bench.comparison import Earlier
from offload.bench.run import Row


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
