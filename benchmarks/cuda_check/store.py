"""The results file, whole at every moment.

Knows: that each row is on the disk before the next is measured. Does not know: what rows say. One
process at a time writes: the check itself, or the part that it waits for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Cell = str | int | float | bool | None
Row = dict[str, Cell]


class Store:
    """Results in the JSON file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {"parts": {}}

    def write(self, report: dict[str, Any]) -> None:
        """Replace the file in one step."""
        scratch = self.path.with_name(self.path.name + ".part")
        scratch.write_text(json.dumps(report, indent=1) + "\n")
        scratch.replace(self.path)

    def part(self, name: str) -> Part:
        return Part(self, name)


class Part:
    """The share of the results that one part writes."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name

    def _change(self, key: str, value: Any, *, append: bool) -> None:
        report = self._store.read()
        part = report["parts"].setdefault(self.name, {"status": "running", "rows": [], "notes": []})
        if append:
            part[key].append(value)
        else:
            part[key] = value
        self._store.write(report)

    def add(self, row: Row) -> None:
        """A line of the part's table."""
        self._change("rows", row, append=True)

    def note(self, text: str) -> None:
        """A line below it: what was left out, and why."""
        self._change("notes", text, append=True)

    def set(self, key: str, value: Any) -> None:
        self._change(key, value, append=False)

    def of(self, part: str, key: str) -> Any:
        """What another part has `set`; None where it has not."""
        return self._store.read()["parts"].get(part, {}).get(key)
