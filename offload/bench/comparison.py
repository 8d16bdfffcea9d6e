"""Rows beside those of an earlier run.

Knows: which row belongs to which, the ratio of two speeds and its error. Does not know: how either
is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.bench.run import Row
from offload.files import user_path
from offload.lines import printable
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
