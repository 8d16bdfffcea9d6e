"""A routing trace and its replays as tables in text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from offload.cache.statistics import LayerCounts
from offload.cache.trace.file import read
from offload.cache.trace.replay import BELADY, NONE, Outcome, Setup, recorded_setup, replay
from offload.cache.trace.synthetic import SHAPES, Routing, synthesize
from offload.cache.trace.trace import CacheError, LayerShape, Trace, shapes
from offload.errors import SourceError
from offload.files import user_path

SYNTHETIC = "synthetic:"
TOKENS = 300  # length of a synthetic trace


def open_trace(name: str) -> Trace:
    """The trace in the file `name`, or a synthetic one of a known model. Raises `SourceError`."""
    if not name.startswith(SYNTHETIC):
        try:
            return read(user_path(name))
        except CacheError as error:
            raise SourceError(str(error)) from None
    shape = SHAPES.get(name.removeprefix(SYNTHETIC))
    if shape is None:
        raise SourceError(f"there is no model {name}: write {SYNTHETIC}{' or '.join(SHAPES)}")
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
    yield "settings     " + ", ".join(f"{name} {value}" for name, value in header.settings.items())
    yield ""
    found = shapes(trace)
    aheads = sorted(set().union(*(shape.guessed for shape in found)))
    names = ["layer", "chosen %", "effective", "repeats", "LRU k", "LRU 2k", "LRU 4k"]
    names += [f"recall +{ahead}" for ahead in aheads]
    yield _row(names)
    yield _row(["---:"] * len(names))
    for index, shape in enumerate(found):
        yield _row([str(index), *_shape(shape, header.experts[index], header.top_k, aheads)])
    whole = sum(found, LayerShape())
    mean = [whole.locality, *(whole.hits_within(header.top_k * n) for n in (1, 2, 4))]
    yield _row(["all", "", "", *map(_percent, mean), *(_recall(whole, a) for a in aheads)])


def _shape(shape: LayerShape, experts: int, k: int, aheads: Sequence[int]) -> list[str]:
    used = len(shape.chosen) / experts
    hits = [_percent(shape.hits_within(k * n)) for n in (1, 2, 4)]
    return [
        _percent(used),
        f"{shape.effective_experts:.1f}",
        _percent(shape.locality),
        *hits,
        *(_recall(shape, ahead) for ahead in aheads),
    ]


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

    What is left out of `policies` and `slots` is as it was recorded. Raises `SourceError`.
    """
    trace = open_trace(name)
    try:
        setups = list(_setups(trace, policies, slots, lookaheads))
        names = "slots resident policy look-ahead hit of-Belady loads/token MiB/token"
        yield _row([*names.split(), "precision", "recall"])
        yield _row(["---:"] * 10)
        ceilings: dict[int, Outcome] = {}
        for setup in setups:
            if setup.slots not in ceilings:
                ceilings[setup.slots] = replay(trace, Setup(setup.slots, BELADY))
                yield _line(trace, ceilings[setup.slots], ceilings[setup.slots])
            outcome = replay(trace, setup)
            yield _line(trace, outcome, ceilings[setup.slots])
            if per_layer:
                yield from _layers(outcome.layers)
    except CacheError as error:
        raise SourceError(str(error)) from None


def _setups(
    trace: Trace,
    policies: Sequence[str],
    slots: Sequence[str],
    lookaheads: Sequence[str],
) -> Iterator[Setup]:
    recorded = None if policies and slots else recorded_setup(trace)
    for size in slots or [str(recorded.slots if recorded else 1)]:
        for policy in policies or [recorded.policy if recorded else BELADY]:
            for lookahead in lookaheads:
                count = parse_share(size, trace.header.total_experts)
                cards = recorded.cards if recorded and not slots else ()
                yield Setup(count, policy, lookahead=lookahead, cards=cards)


def parse_share(text: str, whole: int) -> int:
    """A number of slots, or a share of all experts like "25%"; at least one."""
    try:
        if text.endswith("%"):
            return max(1, round(float(text[:-1]) / 100 * whole))
        return int(text)
    except (ValueError, OverflowError):
        raise CacheError(f"{text!r} is not a number of slots nor a share like 25%") from None


def _line(trace: Trace, outcome: Outcome, ceiling: Outcome) -> str:
    setup, counts = outcome.setup, outcome.counts
    looked = setup.lookahead != NONE
    share = setup.slots / trace.header.total_experts
    best, tokens = ceiling.counts.hit_rate, max(1, trace.tokens)
    return _row(
        [
            str(setup.slots),
            f"{share:.0%}",
            setup.policy,
            f"{setup.lookahead}" if looked else "",
            _percent(counts.hit_rate),
            _percent(counts.hit_rate / best) if best else "",
            f"{counts.loads / tokens:.2f}",
            f"{outcome.bytes_loaded / tokens / 2**20:.2f}",
            _percent(counts.lookahead_precision) if looked else "",
            _percent(counts.lookahead_recall) if looked else "",
        ]
    )


def _layers(layers: Sequence[LayerCounts]) -> Iterator[str]:
    for index, counts in enumerate(layers):
        yield (
            f"    layer {index:>3}: hits {counts.hit_rate:.1%}, look-ahead precision "
            f"{counts.lookahead_precision:.1%}, recall {counts.lookahead_recall:.1%}"
        )


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
