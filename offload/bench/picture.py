"""`--plot`: tokens/s and hit rate over the share of resident experts, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload import files
from offload.bench.row import BenchRow
from offload.quant.errors import OffloadError

DPI = 120


def check_picture(file: Path) -> None:
    """Raise `OffloadError` if `save_picture` would: to be called before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OffloadError(
            "--plot needs matplotlib: pip install matplotlib, or leave --plot out"
        ) from None
    try:
        files.check_writable(file)
    except OSError as error:
        raise _unwritable(file, error) from None


def save_picture(rows: Sequence[BenchRow], file: Path) -> None:
    """Draw a column of panels per test, tokens/s above hit rate, with a line for each setting.

    Raises `OffloadError` if `file` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(row.test.name for row in rows))
    figure = Figure(figsize=(1 + 4 * len(tests), 6), layout="constrained", dpi=DPI)
    panels = figure.subplots(2, len(tests), sharex=True, squeeze=False)
    lines: dict[str, None] = dict.fromkeys(_name(row) for row in rows)
    for at, test in enumerate(tests):
        speed, hits = panels[0][at], panels[1][at]
        for name in lines:
            chosen = [r for r in rows if r.test.name == test and _name(r) == name]
            _line(speed, hits, name, sorted(chosen, key=lambda row: row.resident))
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
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise _unwritable(file, error) from None


def _line(speed: Any, hits: Any, name: str, rows: Sequence[BenchRow]) -> None:
    if not rows:
        return
    resident = [100 * row.resident for row in rows]
    rates, spreads = [r.avg_ts for r in rows], [r.stddev_ts for r in rows]
    speed.errorbar(resident, rates, yerr=spreads, marker="o", capsize=3, label=name)
    hits.plot(resident, [100 * r.hit_rate for r in rows], marker="o", label=name)


def _name(row: BenchRow) -> str:
    """The settings of the row, without its number of expert slots."""
    return f"{row.bits}, {row.policy}, look-ahead {row.lookahead_name}"


def _unwritable(file: Path, error: OSError) -> OffloadError:
    return OffloadError(f"cannot write {file} ({error.strerror}): name another file for --plot")
