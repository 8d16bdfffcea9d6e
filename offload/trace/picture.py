"""The heat map of a trace, as text or drawn to a file by matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload.cache.trace.heatmap import HeatMap, collect, draw_for
from offload.cache.trace.replay import Setup
from offload.cache.trace.trace import CacheError
from offload.quant.errors import OffloadError
from offload.trace.show import open_trace

DPI = 120
MOST_INCHES = 20.0


def save_png(heat: HeatMap, file: Path, title: str) -> None:
    """Draw three panels of experts by layers: resident, hits, misses.

    Raises `OffloadError` if matplotlib is missing or `file` cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise OffloadError(
            "drawing a PNG needs matplotlib: pip install matplotlib, or leave out -o for "
            "a picture in the terminal"
        ) from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels: list[tuple[str, Sequence[Sequence[float]], str]] = [
        ("resident at the end", heat.resident, "Greens"),
        ("hits", heat.hits or heat.uses, "viridis"),
        ("misses", heat.misses or [[0] * len(row) for row in heat.resident], "inferno"),
    ]
    layers, experts = len(heat.resident), max(map(len, heat.resident))
    wide = experts > 2 * layers  # then the panels lie one below the other
    grid = (3, 1) if wide else (1, 3)
    side = (min(MOST_INCHES, 3 + experts * 0.09), 1 + layers * 0.09)
    size = (
        (side[0], 3 * side[1]) if wide else (3 * max(2.6, 1 + experts * 0.09), 1.2 + layers * 0.16)
    )
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    figure.suptitle(title)
    for at, (name, counts, colors) in enumerate(panels):
        _panel(figure, figure.add_subplot(*grid, at + 1), name, counts, colors)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise OffloadError(f"cannot write {file} ({error.strerror}): name another -o") from None


def _panel(
    figure: Any, axes: Any, name: str, counts: Sequence[Sequence[float]], colors: str
) -> None:
    widest = max(map(len, counts))
    rows = [[*map(float, row), *[float("nan")] * (widest - len(row))] for row in counts]
    yes_or_no = name.startswith("resident")
    image = axes.imshow(
        rows,
        cmap=colors,
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1.25 if yes_or_no else None,
    )
    axes.set_title(name)
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if not yes_or_no:
        figure.colorbar(image, ax=axes)


def plot(trace_name: str, expert_slots: str, policy: str, file: Path | None) -> str:
    """Draw the heat map of a replayed trace to `file`, or return it as text where that is None.

    Raises `OffloadError`.
    """
    from offload.units import parse_slots

    try:
        trace = open_trace(trace_name)
        slots = parse_slots(expert_slots, trace.header.total_experts)
        assert slots is not None
        heat = collect(trace, Setup(slots, policy))
    except CacheError as error:
        raise OffloadError(str(error)) from None
    if file is None:
        return draw_for(sys.stdout, heat)

    hits, misses = sum(map(sum, heat.hits)), sum(map(sum, heat.misses))
    save_png(
        heat,
        file,
        f"{trace.header.model}: {slots} slots for {trace.header.total_experts} experts, "
        f"{policy}, hits {hits / max(1, hits + misses):.1%}",
    )
    return ""
