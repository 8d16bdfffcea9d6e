"""A routing trace as tables in text: the run itself, its replays, and a heat map of a replay."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offload.cache.trace.file import read
from offload.cache.trace.heatmap import HeatMap, collect, draw_for
from offload.cache.trace.replay import BELADY, NONE, Outcome, Setup, recorded_setup, replay
from offload.cache.trace.synthetic import SHAPES, Routing, synthesize
from offload.cache.trace.trace import (
    CacheError,
    CardSlots,
    LayerShape,
    Setting,
    Trace,
    shapes,
)
from offload.errors import SourceError
from offload.files import user_path
from offload.pictures import check_picture, save_figure
from offload.units import parse_slots

SYNTHETIC = "synthetic:"
TOKENS = 300  # length of a synthetic trace
DPI = 120
MOST_INCHES, MOST_TICKS = 20.0, 12


def open_trace(name: str) -> Trace:
    """The trace in the file `name`, or a synthetic one of a known model. Raises `SourceError`."""
    if not name.startswith(SYNTHETIC):
        try:
            return read(user_path(name))
        except CacheError as error:
            raise SourceError(str(error)) from None
    shape = SHAPES.get(name.removeprefix(SYNTHETIC))
    if shape is None:
        raise SourceError(
            f"{name} is not known: choose one of {', '.join(SYNTHETIC + each for each in SHAPES)}"
        )
    return synthesize(shape, Routing(recall=0.85), TOKENS)


def show(name: str) -> Iterator[str]:
    """Lines about a trace: the run, its tokens, the routing of each layer."""
    trace = open_trace(name)
    header = trace.header
    kinds = sorted(set(header.experts))
    yield f"model        {header.model}"
    yield f"experts      {header.layers} layers x {'/'.join(map(str, kinds))}, top-{header.top_k}"
    yield f"record       {max(header.record_bytes) / 2**20:.2f} MiB"
    prompts = trace.tokens - trace.generated
    yield f"tokens       {trace.tokens}: {prompts} of prompts, {trace.generated} generated"
    settings = {k: v for k, v in header.settings.items() if v not in ("", None)}
    yield "settings     " + ", ".join(f"{name} {_word(value)}" for name, value in settings.items())
    yield ""
    found = shapes(trace)
    aheads = sorted(set().union(*(shape.guessed for shape in found)))
    names = ["layer", "chosen %", "effective", "repeats", "LRU k", "LRU 2k", "LRU 4k"]
    names += [f"recall +{ahead}" for ahead in aheads]
    widths = [max(len(name), len("100.0%")) for name in names]
    yield from _head(names, widths)
    for index, shape in enumerate(found):
        used = _percent(len(shape.chosen) / header.experts[index])
        effective = f"{shape.effective_experts:.1f}"
        yield _row([str(index), used, effective, *_shares(shape, header.top_k, aheads)], widths)
    yield _row(["all", "", "", *_shares(sum(found, LayerShape()), header.top_k, aheads)], widths)


def _word(value: Setting) -> str:
    """A setting as people write it."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _shares(shape: LayerShape, k: int, aheads: Sequence[int]) -> list[str]:
    shares = [shape.locality, *(shape.hits_within(k * n) for n in (1, 2, 4))]
    return [*map(_percent, shares), *(_recall(shape, ahead) for ahead in aheads)]


def _recall(shape: LayerShape, ahead: int) -> str:
    asked = shape.asked[ahead]
    return _percent(shape.right[ahead] / asked) if asked else ""


def replays(
    name: str,
    policies: Sequence[str],
    slots: Sequence[str],
    lookaheads: Sequence[str],
    *,
    per_layer: bool = False,
) -> Iterator[str]:
    """Lines of a table: every combination, and Belady's optimum for each number of slots.

    What is left out of `policies` and `slots` is as it was recorded. An expert that look-ahead has
    just loaded is a hit, but not one that the cache kept, and only the latter are compared with the
    optimum. Raises `OffloadError`.
    """
    trace = open_trace(name)
    try:
        setups = list(_setups(trace, policies, slots, lookaheads))
        names = ["slots", "resident", "policy", "look-ahead", "hit", "kept", "of-Belady"]
        names += ["loads/token", "MiB/token", "precision", "recall"]
        widths = [max(len(name), len("100.0%")) for name in names]
        yield from _head(names, widths)
        ceilings: dict[int, Outcome] = {}
        for setup in setups:
            if setup.slots not in ceilings:
                ceilings[setup.slots] = replay(trace, Setup(setup.slots, BELADY))
                yield _row(_cells(trace, ceilings[setup.slots], ceilings[setup.slots]), widths)
            outcome = replay(trace, setup)
            yield _row(_cells(trace, outcome, ceilings[setup.slots]), widths)
            if not per_layer:
                continue
            for index, counts in enumerate(outcome.layers):
                yield (
                    f"    layer {index:>3}: hits {counts.hit_rate:.1%}, look-ahead precision "
                    f"{counts.lookahead_precision:.1%}, recall {counts.lookahead_recall:.1%}"
                )
    except CacheError as error:
        raise SourceError(str(error)) from None
    yield ""
    yield "hit: experts that were in a slot in time. kept: the hits that look-ahead had not just"
    yield "loaded; Belady's optimum, which loads nothing early, is compared with these. They can"
    yield "be more than 100% of it after a warm start, whose loads come before anybody asks."


def _setups(
    trace: Trace,
    policies: Sequence[str],
    slots: Sequence[str],
    lookaheads: Sequence[str],
) -> Iterator[Setup]:
    cards: tuple[CardSlots, ...] = ()
    if not (policies and slots):
        recorded = recorded_setup(trace)
        policies = policies or [recorded.policy]
        cards = () if slots else recorded.cards
        slots = slots or [str(recorded.slots)]
    for size, policy, lookahead in itertools.product(slots, policies, lookaheads):
        yield Setup(_slots(size, trace), policy, lookahead=lookahead, cards=cards)


def _slots(text: str, trace: Trace) -> int:
    slots = parse_slots(text, trace.header.total_experts)
    assert slots is not None  # only None gives None
    return slots


def _cells(trace: Trace, outcome: Outcome, ceiling: Outcome) -> list[str]:
    setup, counts = outcome.setup, outcome.counts
    looked = setup.lookahead != NONE
    share = setup.slots / trace.header.total_experts
    best, tokens = ceiling.counts.hit_rate, max(1, trace.tokens)
    kept = (counts.hits - counts.lookahead_loads_right) / max(1, counts.requests)
    return [
        str(setup.slots),
        f"{share:.0%}",
        setup.policy,
        setup.lookahead if looked else "",
        _percent(counts.hit_rate),
        _percent(kept),
        _percent(kept / best) if best else "",
        f"{counts.loads / tokens:.2f}",
        f"{outcome.bytes_loaded / tokens / 2**20:.2f}",
        _percent(counts.lookahead_precision) if looked else "",
        _percent(counts.lookahead_recall) if looked else "",
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _head(names: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    yield _row(names, widths)
    yield _row(["-" * (width - 1) + ":" for width in widths], widths)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a Markdown table, whose columns are aligned to the right."""
    return f"| {' | '.join(map(str.rjust, cells, widths))} |"


def plot(name: str, expert_slots: str, policy: str, file: Path | None) -> str:
    """Draw the heat map of a replayed trace to `file`, or return it as text where that is None.

    Raises `OffloadError`.
    """
    check_picture(file, "-o")
    trace = open_trace(name)
    slots = _slots(expert_slots, trace)
    try:
        heat = collect(trace, Setup(slots, policy))
    except CacheError as error:
        raise SourceError(str(error)) from None
    if file is None:
        return f"{draw_for(sys.stdout, heat)}\n     {policy}, replayed without look-ahead"
    hits, misses = sum(map(sum, heat.hits)), sum(map(sum, heat.misses))
    _save_picture(
        heat,
        file,
        f"{trace.header.model}: {slots} slots for {trace.header.total_experts} experts, "
        f"{policy} without look-ahead, hits {hits / max(1, hits + misses):.1%}",
    )
    return ""


def _save_picture(heat: HeatMap, file: Path, title: str) -> None:
    """Draw three panels of experts by layers: resident, hits, misses. Raises `OffloadError`."""
    from matplotlib.figure import Figure

    layers, experts = len(heat.resident), max(map(len, heat.resident))
    wide = experts > 2 * layers  # the panels then lie one below the other
    grid = (3, 1) if wide else (1, 3)
    side = (min(MOST_INCHES, 3 + experts * 0.09), 1 + layers * 0.09)
    size = (
        (side[0], 3 * side[1]) if wide else (3 * max(2.6, 1 + experts * 0.09), 1.2 + layers * 0.16)
    )
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    figure.suptitle(title)
    most = max(1, *map(max, (*heat.hits, *heat.misses)))  # a miss is as bright as a hit
    panels: list[tuple[str, Sequence[Sequence[float]], str, float]] = [
        ("resident at the end", heat.resident, "Greens", 1.25),
        ("hits", heat.hits, "viridis", most),
        ("misses", heat.misses, "viridis", most),
    ]
    axes: Any = None
    for at, (name, counts, colors, brightest) in enumerate(panels, start=1):
        axes = figure.add_subplot(*grid, at, sharex=axes if wide else None)
        rows = [[*map(float, row), *[float("nan")] * (experts - len(row))] for row in counts]
        image = axes.imshow(
            rows, cmap=colors, aspect="auto", interpolation="nearest", vmin=0, vmax=brightest
        )
        axes.set(title=name, ylabel="MoE layer")
        if not wide or at == len(panels):
            axes.set_xlabel("expert")
        for axis, count in ((axes.xaxis, experts), (axes.yaxis, layers)):
            axis.get_major_locator().set_params(integer=True, nbins=min(count, MOST_TICKS))
        if at > 1:  # a panel of yes and no needs no scale
            figure.colorbar(image, ax=axes, label="times used")
    save_figure(figure, file)
