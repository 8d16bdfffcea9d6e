"""Heat maps for readers: of a running model, of a trace; as text or as a file.

Knows: where the counts come from and what a terminal can show. Does not know: how a map is drawn
(`cache.heatmap`, `offload.plot`).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

from offload.cache.errors import CacheError
from offload.cache.trace.heatmap import HeatMap, collect, draw
from offload.cache.trace.replay import Setup
from offload.quant.errors import OffloadError
from offload.trace.show import open_trace


def plot(
    trace_name: str, expert_slots: str, policy: str, allocation: str, file: Path | None
) -> str:
    """The heat map of a replayed trace: drawn to `file`, else returned as text."""
    from offload.budget.budget import parse_slots

    try:
        trace = open_trace(trace_name)
        slots = parse_slots(expert_slots, trace.header.total_experts)
        assert slots is not None
        heat = collect(trace, Setup(slots, policy, allocation))
    except CacheError as error:
        raise OffloadError(str(error)) from None
    if file is None:
        return show(heat, sys.stdout)
    from offload.trace.picture import save_png

    hits, misses = sum(map(sum, heat.hits)), sum(map(sum, heat.misses))
    save_png(
        heat,
        file,
        f"{trace.header.model}: {slots} slots for {trace.header.total_experts} experts, "
        f"{policy}, hits {hits / max(1, hits + misses):.1%}",
    )
    return ""


def show(heat: HeatMap, stream: TextIO) -> str:
    """`heat` as text for `stream`: in colours at a terminal that has them, unless NO_COLOR."""
    terminal = stream.isatty()
    color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size().columns if terminal else 10**6  # a file has no edge
    try:
        "░█".encode(stream.encoding or "ascii")
        blocks = True
    except UnicodeEncodeError:
        blocks = False
    return draw(heat, width=width, color=color, blocks=blocks)
