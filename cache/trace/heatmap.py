"""A picture of experts by layers, in characters.

Blocks stand for experts that are resident, points for experts that are not. The fuller the sign,
the more the expert was asked for.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import TextIO

from offload.cache.decision import Decision
from offload.cache.sharded import Cache
from offload.cache.trace.replay import Setup, make_cache, replay_with
from offload.cache.trace.trace import Event, Trace

BLOCKS, POINTS = "░▒▓█", " .:!"
PLAIN_BLOCKS = "-+*#"  # where blocks cannot be written
GREENS, REDS = (22, 28, 34, 46), (236, 88, 124, 196)  # numbers of a terminal's 256 colours
HTML_GREENS = ("#005f00", "#008700", "#00af00", "#00ff00")  # the same colours as above
HTML_REDS = ("#303030", "#870000", "#af0000", "#ff0000")
LABEL, RATE = 5, 13  # columns before and after a row

Resident = tuple[tuple[bool, ...], ...]  # [layer][expert]


@dataclass(frozen=True)
class HeatMap:
    """Counts [layer][expert]; layers need not have the same number of experts."""

    uses: tuple[tuple[float, ...], ...]  # how often each expert was asked for, lately or in all
    resident: Resident
    hit_rates: tuple[float | None, ...]  # of each layer; None where nothing was asked for yet
    hits: tuple[tuple[int, ...], ...] = ()  # empty where they are not counted for each expert
    misses: tuple[tuple[int, ...], ...] = ()

    def level(self, layer: int, expert: int) -> int:
        """How much an expert was used, from 0 for never to 3 for most.

        1 to 3 are thirds of the uses of the layer's most used expert.
        """
        uses = self.uses[layer]
        most = max(uses)
        if not uses[expert]:
            return 0
        return min(3, 1 + int(3 * uses[expert] / most * 0.999))


def draw(heat: HeatMap, *, width: int | None = 80, color: bool = False, blocks: bool = True) -> str:
    """One row or more for each layer, with the experts' numbers above and a legend below.

    The map fills `width` columns if that is given; otherwise an expert takes one column.
    """
    most = max(map(len, heat.resident))
    room = most if width is None else max(8, width - LABEL - RATE)
    cell = max(1, room // most)  # columns of an expert, one of them a gap where there are many
    rows = [f"{len(heat.resident)} layers, one per row; {most} experts each, one per column"]
    if most <= room:
        rows.append(_numbers(most, cell))
    for layer, experts in enumerate(heat.resident):
        cells = [_cell(heat, layer, e, cell, color, blocks) for e in range(len(experts))]
        for begin in range(0, len(cells), room):
            label = f"{layer:>4} " if begin == 0 else " " * LABEL
            row = label + "".join(cells[begin : begin + room])
            rate = heat.hit_rates[layer]
            if begin + room >= len(cells) and rate is not None:
                pad = " " * (min(room, most) - len(cells[begin : begin + room])) * cell
                row += f"{pad} {rate:>6.1%} hits"
            rows.append(row.rstrip())
    signs = BLOCKS if blocks else PLAIN_BLOCKS
    resident, total = sum(map(sum, heat.resident)), sum(map(len, heat.resident))
    rows.append(f"{resident} of {total} experts in memory ({resident / total:.0%})")
    unused, *used = [
        _painted(sign, [code], color) for sign, code in zip(signs, GREENS, strict=True)
    ]
    rows.append(f"in memory:     {unused} never used   {' '.join(used)} used more and more")
    unused, *used = [_painted(sign, [code], color) for sign, code in zip(POINTS, REDS, strict=True)]
    rows.append(f"not in memory: {unused} never used   {' '.join(used)} used more and more")
    return "\n".join(rows)


def _numbers(experts: int, cell: int) -> str:
    """A line with numbers of experts above their columns, as many as there is room for."""
    step = 1
    while step * cell <= len(str(experts)):
        step *= 2
    return (
        " " * LABEL
        + "".join(f"{expert:<{step * cell}}" for expert in range(0, experts, step)).rstrip()
    )


def as_html(heat: HeatMap) -> str:
    """A table for notebooks: a row for each layer, a cell for each expert, and a legend."""
    rates = ["" if rate is None else f"{rate:.1%} hits" for rate in heat.hit_rates]
    rows = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(
            f'<td style="background:{(HTML_GREENS if is_in else HTML_REDS)[heat.level(layer, e)]};'
            f'min-width:.7em;padding:0" title="layer {layer}, expert {e}">&nbsp;</td>'
            for e, is_in in enumerate(experts)
        )
        + f"<td>{rates[layer]}</td></tr>"
        for layer, experts in enumerate(heat.resident)
    )
    resident, total = sum(map(sum, heat.resident)), sum(map(len, heat.resident))
    return (
        f"<table>{rows}</table><p>{resident} of {total} experts in memory (green), the others grey "
        "to red; the brighter, the more a layer asked for the expert.</p>"
    )


@dataclass(frozen=True)
class Part:
    """Some layers of a model in a small map, and the experts of each of its columns."""

    layers: range
    shares: tuple[float, ...]  # of each column: how many of its experts are marked


def squeezed(marked: Resident, rows: int = 4, width: int = 64) -> list[Part]:
    """How much of each part of a model is `marked`, in at most `rows` rows and `width` columns."""
    parts = []
    for begin, end in _parts(len(marked), rows):
        most = max(len(experts) for experts in marked[begin:end])
        shares = []
        for first, last in _parts(most, width):
            here = [is_in for experts in marked[begin:end] for is_in in experts[first:last]]
            shares.append(sum(here) / max(1, len(here)))
        parts.append(Part(range(begin, end), tuple(shares)))
    return parts


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """`range(count)` as at most `most` ranges of nearly equal lengths."""
    parts = min(count, most)
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _cell(heat: HeatMap, layer: int, expert: int, width: int, color: bool, blocks: bool) -> str:
    level = heat.level(layer, expert)
    if heat.resident[layer][expert]:
        sign, code = (BLOCKS if blocks else PLAIN_BLOCKS)[level], GREENS[level]
    else:
        sign, code = POINTS[level], REDS[level]
    wide = sign * (width - (width > 2))  # a gap keeps neighbours apart
    return _painted(wide, [code] * len(wide), color) + " " * (width > 2)


def _painted(signs: str, codes: Sequence[int], color: bool) -> str:
    """Each sign in the terminal colour at the same place of `codes`; without `color` as it is."""
    if not color:
        return signs
    return "".join(f"\x1b[38;5;{c}m{sign}\x1b[0m" for sign, c in zip(signs, codes, strict=True))


def collect(trace: Trace, setup: Setup) -> HeatMap:
    """Replay `trace` as `setup` says, without look-ahead, and count for each expert."""
    hits = [[0] * experts for experts in trace.header.experts]
    misses = [[0] * experts for experts in trace.header.experts]

    def count(_: Cache, event: Event, decision: Decision) -> None:
        held = {use.expert for wave in decision.waves for use in wave.hits}
        for expert in event.distinct():
            (hits if expert in held else misses)[event.layer][expert] += 1

    cache = make_cache(trace, setup)
    replay_with(trace, cache, setup, lambda _: (), count)
    both = zip(hits, misses, strict=True)
    return replace(
        of_cache(cache, trace.header.experts),
        uses=tuple(tuple(map(add, *pair)) for pair in both),
        hits=tuple(map(tuple, hits)),
        misses=tuple(map(tuple, misses)),
    )


def of_cache(cache: Cache, experts: Sequence[int]) -> HeatMap:
    """What `cache` holds now, and how much its experts were used lately.

    `experts` has the number of each layer's experts.
    """
    return HeatMap(
        uses=tuple(tuple(cache.heat.of(i, e) for e in range(n)) for i, n in enumerate(experts)),
        resident=resident_in(cache, experts),
        hit_rates=tuple(
            counts.hit_rate if counts.requests else None for counts in cache.statistics.layers
        ),
    )


def resident_in(cache: Cache, experts: Sequence[int]) -> Resident:
    """Whether each expert is in `cache` now; `experts` has the number of each layer's experts."""
    return tuple(tuple(cache.is_resident(i, e) for e in range(n)) for i, n in enumerate(experts))


def draw_for(stream: TextIO, heat: HeatMap) -> str:
    """`heat` as text for `stream`, in colours where a terminal has them and NO_COLOR is not set."""
    terminal = stream.isatty()
    color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size().columns if terminal else None  # a file has no right edge
    try:
        "░█".encode(stream.encoding or "ascii")
        blocks = True
    except UnicodeEncodeError:
        blocks = False
    return draw(heat, width=width, color=color, blocks=blocks)
