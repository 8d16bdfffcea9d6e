"""`--compare`: this run's tokens/s beside those of an earlier run, row by row."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload.bench.row import BenchRow
from offload.files import user_path
from offload.lines import printable
from offload.quant.errors import OffloadError

# Rows measure the same if these keys agree. Of such rows, the one with the most equal settings is
# compared with.
SAME = ("model", "text", "n_prompt", "n_gen", "n_depth")
SETTINGS = ("backends", "bits", "policy", "lookahead", "expert_slots", "n_threads")
MOST_TOLD = 4  # rows in a message
FIGURES = ("avg_ts", "stddev_ts")


@dataclass(frozen=True)
class Ratio:
    """Tokens/s of this run over those of the earlier one.

    The error is that of a quotient of two independent means, to first order: the relative errors
    are added in squares.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class EarlierRun:
    """The rows of an earlier run, as its JSON has them."""

    rows: tuple[dict[str, Any], ...]

    def ratio(self, row: BenchRow) -> Ratio | None:
        """`row` over the earlier row of the same test; None unless exactly one row is nearest.

        The earlier row may have other settings: the ratio then tells what the settings change.
        """
        nearest = self._nearest(row)
        if len(nearest) != 1:
            return None
        (then,) = nearest
        value = row.avg_ts / then["avg_ts"]
        errors = row.stddev_ts / row.avg_ts, then["stddev_ts"] / then["avg_ts"]
        return Ratio(value, value * math.hypot(*errors))

    def why_none(self, row: BenchRow) -> str:
        """Why there is no ratio, which rows the file has, and what to do; "" if there is one."""
        nearest, mine = self._nearest(row), asdict(row)
        if len(nearest) == 1:
            return ""
        if not nearest:
            there = _few(_told(then, SAME) for then in self.rows)
            return (
                f"no row to compare with {_told(mine, SAME)}: the file has {there}; measure one of "
                "these with -p, -n, -pg and -d"
            )
        unlike = [key for key in SETTINGS if len({str(then.get(key)) for then in nearest}) > 1]
        there = _few(_told(then, unlike) for then in nearest)
        return (
            f"{len(nearest)} rows of the file are equally near to "
            f"{_told(mine, (*SAME, *unlike))}: {there or 'all are alike'}; measure with the "
            "settings of one of them, or keep only one of them in the file"
        )

    def _nearest(self, row: BenchRow) -> list[dict[str, Any]]:
        """Of the rows of the same test, those with the most equal settings."""
        mine = asdict(row)
        same = [then for then in self.rows if all(then[key] == mine[key] for key in SAME)]
        near = [sum(then.get(key) == mine[key] for key in SETTINGS) for then in same]
        return [then for then, count in zip(same, near, strict=True) if count == max(near)]


def _told(row: dict[str, Any], keys: Iterable[str]) -> str:
    return " ".join(f"{key}={row.get(key)}" for key in keys)


def _few(texts: Iterable[str]) -> str:
    """The different texts, shortened to what fits into a line or two."""
    each = list(dict.fromkeys(text for text in texts if text))
    more = f" and {len(each) - MOST_TOLD} more" if len(each) > MOST_TOLD else ""
    return printable(" ".join("; ".join(each[:MOST_TOLD]).split())) + more


def read_earlier(file: str | Path) -> EarlierRun:
    """The run that `-o json` or `-o jsonl` wrote to `file`. Raises `OffloadError`."""
    try:
        text = user_path(file).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no rows")
        for row in rows:
            if missing := [key for key in (*SAME, *FIGURES) if key not in row]:
                raise ValueError(f"a row has no {missing[0]}")
            figures = [row[key] for key in FIGURES]
            if not all(type(each) in (int, float) and math.isfinite(each) for each in figures):
                raise ValueError("a speed is not a number")
            if figures[0] <= 0 or figures[1] < 0:
                raise ValueError("a speed is not above 0")
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OffloadError(
            f"cannot compare with {file} ({reason}): name a file that offload bench -o json wrote"
        ) from None
    return EarlierRun(tuple(rows))
