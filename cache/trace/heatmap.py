"""A picture of experts by layers, in characters: resident or not, used much or little.

Knows: signs, colours, widths. Does not know: whether the reader is a terminal (`offload.report`),
how a PNG is drawn (`offload.plot`).

Blocks stand for experts that are resident, points for those that are not; the fuller the sign, the
more the expert was asked for.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from offload.cache.interface import Cache
from offload.cache.trace.replay import Setup, admitted, make_cache, prepare
from offload.cache.trace.trace import Trace

BLOCKS, POINTS = "░▒▓█", " .:!"
FULLNESS = " ░▒▓█"  # of a part of the model: no expert resident, up to all
PLAIN_BLOCKS = "-+*#"  # where blocks cannot be written
GREENS, REDS = (22, 28, 34, 46), (236, 88, 124, 196)  # of the 256 colours of a terminal
LABEL, RATE = 5, 13  # columns before and after a row

Resident = tuple[tuple[bool, ...], ...]  # [layer][expert]


@dataclass(frozen=True)
class HeatMap:
    """Counts [layer][expert]; layers need not have the same number of experts."""

    uses: tuple[tuple[float, ...], ...]  # asked for, lately or in all
    resident: Resident
    hit_rates: tuple[float, ...]  # of each layer
    hits: tuple[tuple[int, ...], ...] = ()  # where they are known for each expert
    misses: tuple[tuple[int, ...], ...] = ()

    def level(self, layer: int, expert: int) -> int:
        """0 to 3: never used, then thirds of the most that an expert of this layer was used."""
        uses = self.uses[layer]
        most = max(uses)
        if not uses[expert]:
            return 0
        return min(3, 1 + int(3 * uses[expert] / most * 0.999))


def draw(heat: HeatMap, *, width: int = 80, color: bool = False, blocks: bool = True) -> str:
    """A row or more a layer, at most `width` columns, with a legend below."""
    room = max(8, width - LABEL - RATE)
    rows = []
    for layer, experts in enumerate(heat.resident):
        cells = [_cell(heat, layer, e, color, blocks) for e in range(len(experts))]
        for begin in range(0, len(cells), room):
            label = f"{layer:>4} " if begin == 0 else " " * LABEL
            row = label + "".join(cells[begin : begin + room])
            if begin + room >= len(cells):
                pad = " " * (min(room, len(cells)) - len(cells[begin : begin + room]))
                row += f"{pad} {heat.hit_rates[layer]:>6.1%} hits"
            rows.append(row)
    signs = BLOCKS if blocks else PLAIN_BLOCKS
    resident = sum(map(sum, heat.resident))
    total = sum(map(len, heat.resident))
    rows.append(
        f"     {resident} of {total} experts resident: {_legend(signs, GREENS, color)} by use; "
        f"elsewhere: {_legend(POINTS.strip(), REDS[1:], color)}"
    )
    return "\n".join(rows)


def squeezed(resident: Resident, rows: int = 4, width: int = 64) -> str:
    """How full each part of the model is, in at most `rows` rows of layers and `width` columns of
    experts: blank where none is resident, a full block where all are."""
    lines = []
    for begin, end in _parts(len(resident), rows):
        most = max(len(experts) for experts in resident[begin:end])
        signs = ""
        for first, last in _parts(most, width):
            here = [is_in for experts in resident[begin:end] for is_in in experts[first:last]]
            share = sum(here) / max(1, len(here))
            signs += FULLNESS[math.ceil(share * (len(FULLNESS) - 1))]
        lines.append(f"layers {begin:>2} to {end - 1:>2} |{signs}|")
    return "\n".join(lines)


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """`range(count)` as at most `most` ranges of nearly equal lengths."""
    parts = min(count, most)
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _cell(heat: HeatMap, layer: int, expert: int, color: bool, blocks: bool) -> str:
    level = heat.level(layer, expert)
    if heat.resident[layer][expert]:
        sign, code = (BLOCKS if blocks else PLAIN_BLOCKS)[level], GREENS[level]
    else:
        sign, code = POINTS[level], REDS[level]
    return _painted(sign, code) if color else sign


def _legend(signs: str, codes: tuple[int, ...], color: bool) -> str:
    if not color:
        return signs
    return "".join(_painted(sign, code) for sign, code in zip(signs, codes, strict=True))


def _painted(sign: str, code: int) -> str:
    return f"\x1b[38;5;{code}m{sign}\x1b[0m"


def collect(trace: Trace, setup: Setup) -> HeatMap:
    """Replay `trace` as `setup` says, without look-ahead, and count for each expert."""
    cache = make_cache(trace, setup)
    hits = [[0] * experts for experts in trace.header.experts]
    misses = [[0] * experts for experts in trace.header.experts]
    for event in trace.events:
        prepare(cache, event, setup)
        admit = admitted(event, setup, trace.header)
        decision = cache.decide(event.layer, event.distinct(), prompt=event.prompt, admit=admit)
        for wave in decision.waves:
            for use in wave.hits:
                hits[event.layer][use.expert] += 1
            for use in wave.loads:
                misses[event.layer][use.expert] += 1
        for expert in decision.streamed:
            misses[event.layer][expert] += 1
    both = zip(hits, misses, strict=True)
    return HeatMap(
        uses=tuple(tuple(map(sum, zip(*pair, strict=True))) for pair in both),
        resident=resident_in(cache, trace.header.experts),
        hit_rates=tuple(counts.hit_rate for counts in cache.statistics.layers),
        hits=tuple(map(tuple, hits)),
        misses=tuple(map(tuple, misses)),
    )


def of_cache(cache: Cache, experts: Sequence[int]) -> HeatMap:
    """What `cache` holds now, and how hot the `experts` of each layer are lately."""
    return HeatMap(
        uses=tuple(tuple(cache.heat.of(i, e) for e in range(n)) for i, n in enumerate(experts)),
        resident=resident_in(cache, experts),
        hit_rates=tuple(counts.hit_rate for counts in cache.statistics.layers),
    )


def resident_in(cache: Cache, experts: Sequence[int]) -> Resident:
    """Whether each of the `experts` of each layer is in `cache` now."""
    return tuple(tuple(cache.is_resident(i, e) for e in range(n)) for i, n in enumerate(experts))


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
