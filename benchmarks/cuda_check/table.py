"""Results as tables for people.

Knows: columns, percent, which rows belong to one table. Does not know: where rows come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cuda_check.store import Cell, Row

KIND = "kind"  # rows of one kind share columns


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The whole report, markdown."""
    for name, part in report["parts"].items():
        yield f"\n## {name} ({part['status']}, {part.get('seconds', 0):.0f} s)"
        rows: list[Row] = part["rows"]
        for kind in dict.fromkeys(row.get(KIND) for row in rows):
            alike = [row for row in rows if row.get(KIND) == kind]
            yield ""
            yield from _table(str(kind), alike)
        for note in part["notes"]:
            yield f"- {note}"


def _table(kind: str, rows: list[Row]) -> Iterator[str]:
    columns = [name for name in dict.fromkeys(k for row in rows for k in row) if name != KIND]
    cells = [[_text(name, row.get(name)) for name in columns] for row in rows]
    heads = [name.removesuffix("_share").replace("_", " ") for name in columns]
    heads[0] = f"{kind}: {heads[0]}"
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for row in (heads, ["-" * width for width in widths], *cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(padded)} |"


def _text(column: str, value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.endswith("_share") and isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
