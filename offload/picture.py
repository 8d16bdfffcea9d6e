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

from cache.cache import ExpertCache
from cache.errors import CacheError
from cache.heatmap import HeatMap, collect, draw
from cache.policy import POLICIES
from offload.errors import OffloadError
from offload.simulation import open_trace


def plot(trace_name: str, expert_slots: str, policy: str, file: Path | None) -> str:
    """The heat map of a replayed trace: drawn to `file`, else returned as text."""
    from offload.budget import parse_slots

    try:
        trace = open_trace(trace_name)
        slots = parse_slots(expert_slots, trace.header.total_experts)
        assert slots is not None
        cache = ExpertCache(slots, trace.header.layers, POLICIES[policy]())
        heat = collect(trace, cache)
    except CacheError as error:
        raise OffloadError(str(error)) from None
    if file is None:
        return show(heat, sys.stdout)
    from offload.plot import save_png

    hits = cache.statistics.total().hit_rate
    about = f"{slots} of {trace.header.total_experts} experts resident, {policy}, hits {hits:.1%}"
    save_png(heat, file, f"{trace.header.model}: {about}")
    return ""


def live(cache: ExpertCache, experts: tuple[int, ...]) -> HeatMap:
    """The heat map of a running model whose layers have so many `experts`."""
    layers = cache.statistics.layers
    return HeatMap(
        uses=tuple(tuple(cache.heat.of(i, e) for e in range(n)) for i, n in enumerate(experts)),
        resident=tuple(
            tuple(cache.is_resident(i, e) for e in range(n)) for i, n in enumerate(experts)
        ),
        hit_rates=tuple(counts.hit_rate for counts in layers),
    )


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
