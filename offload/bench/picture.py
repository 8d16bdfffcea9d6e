"""Speed and hit rate against residency, as a picture file.

Knows: matplotlib, which is an extra and drawn without a display. Does not know: how rows came
about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload import files
from offload.bench.run import Row
from offload.quant.errors import OffloadError

DPI = 120


def check_picture(file: Path) -> None:
    """Raise `OffloadError` before anything is measured where `save_picture` would afterwards."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OffloadError(
            "--plot needs matplotlib: pip install matplotlib, or leave it out"
        ) from None
    try:
        files.check_writable(file)
    except OSError as error:
        raise _unwritable(file, error) from None


def save_picture(rows: Sequence[Row], file: Path) -> None:
    """A column of panels a test: tokens/s above, hit rate below; a line for each setting else.
    Raises `OffloadError`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(row.result.test.name for row in rows))
    figure = Figure(figsize=(1 + 4 * len(tests), 6), layout="constrained", dpi=DPI)
    panels = figure.subplots(2, len(tests), sharex=True, squeeze=False)
    lines: dict[str, None] = dict.fromkeys(_name(row) for row in rows)
    for at, test in enumerate(tests):
        speed, hits = panels[0][at], panels[1][at]
        for name in lines:
            chosen = [r for r in rows if r.result.test.name == test and _name(r) == name]
            _line(speed, hits, name, sorted(chosen, key=lambda row: row.result.resident))
        speed.set_title(test)
        speed.set_ylim(bottom=0)
        hits.set_ylim(0, 102)
        hits.set_xlim(0, 102)
        hits.set_xlabel("resident experts, %")
    panels[0][0].set_ylabel("tokens/s")
    panels[1][0].set_ylabel("hit rate, %")
    if len(lines) > 1:
        panels[0][0].legend()
    subject = rows[0].subject
    figure.suptitle(subject.model if len(lines) > 1 else f"{subject.model}: {next(iter(lines))}")
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise _unwritable(file, error) from None


def _line(speed: Any, hits: Any, name: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    resident = [100 * row.result.resident for row in rows]
    rates, spreads = [r.result.avg_ts for r in rows], [r.result.stddev_ts for r in rows]
    speed.errorbar(resident, rates, yerr=spreads, marker="o", capsize=3, label=name)
    hits.plot(
        resident, [100 * r.result.experts.counts.hit_rate for r in rows], marker="o", label=name
    )


def _name(row: Row) -> str:
    """What else than residency the row was measured with."""
    subject = row.subject
    return f"{subject.bits}, {subject.policy}, look-ahead {subject.lookahead_name}"


def _unwritable(file: Path, error: OSError) -> OffloadError:
    return OffloadError(f"cannot write {file} ({error.strerror}): name another --plot")
