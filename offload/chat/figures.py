"""What a chat shows about the experts: statistics, the map of all experts, and the live panel."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from offload.cache.trace.heatmap import Part, Resident, draw_for, resident_in, squeezed

if TYPE_CHECKING:
    from offload.engine.handle import Offload
    from offload.generation.stream import GenerationResponse

FULLNESS = " ░▒▓█"  # from a part of the model without residents to one that is all resident
RESIDENT, NEW = "green", "bright_yellow"
PANEL_SHARE = 1 / 3  # of the terminal's height, at most


def info(handle: Offload, model_type: str) -> str:
    """What is loaded, and where it is."""
    from offload.pack.recipe import bits_name

    about, fit = handle.pack.info, handle.fit
    return (
        f"{about.source}: {model_type}, {len(about.layers)} MoE layers, "
        f"{about.total_experts} experts; bits: {bits_name(about)}\n"
        f"pack {handle.pack.path}\n{handle.stats().residency()} on "
        f"{' and '.join(map(str, fit.devices))}, computing in "
        f"{str(fit.dtype).removeprefix('torch.')}, context {fit.options.context}\n"
    )


def statistics(handle: Offload) -> str:
    """What happened since the model was loaded."""
    stats = handle.stats()
    counts = stats.counts
    if not counts.requests:
        return f"{stats.line()}\nNothing was asked yet.\n"
    return (
        f"{stats.line()}\n"
        f"requests {counts.requests}, hits {counts.hits}, misses {counts.misses}, "
        f"evictions {counts.evictions}\n"
        f"look-ahead: {counts.lookahead_precision:.0%} of {counts.lookahead_guesses} guesses were "
        f"right, {counts.lookahead_recall:.0%} of what was asked for was guessed, "
        f"{counts.lookahead_loads} loads\n"
        f"loaded {stats.bytes_loaded / 2**20:.1f} MiB at {stats.link_gb_per_s:.1f} GB/s, "
        f"waited {counts.wait_seconds:.2f} s, {stats.tokens} tokens\n"
    )


def expert_map(handle: Offload) -> str:
    """Every expert: whether it is in memory, and how much it was used lately."""
    return draw_for(sys.stdout, handle.heat_map()) + "\n"


class Panel:
    """Speed and a map of the resident experts while an answer comes.

    Drawing takes a few milliseconds for thousands of experts.
    """

    def __init__(self, handle: Offload) -> None:
        self._handle = handle
        self._experts = [layer.num_experts for layer in handle.pack.info.layers]
        self._before = resident_in(handle.engine.cache, self._experts)

    def draw(self, response: GenerationResponse | None) -> RenderableType:
        """What to draw now; experts that came since the last call are marked."""
        if response is None:
            return Text()
        now = resident_in(self._handle.engine.cache, self._experts)
        new = tuple(
            tuple(here and not there for here, there in zip(*layers, strict=True))
            for layers in zip(now, self._before, strict=True)
        )
        self._before = now
        stats = response.experts
        line = (
            f"{response.generation_tokens} tokens, {response.generation_tps:.1f} t/s, "
            f"hits {stats.counts.hit_rate:.1%}, {stats.mib_per_token:.1f} MiB/token"
        )
        return _Map(line, now, new)


@dataclass(frozen=True)
class _Map:
    """A map that is as wide as the terminal."""

    line: str
    now: Resident
    new: Resident

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.line, style="dim")
        last = len(self.now) - 1
        label = len(f"layers {last}-{last} ")
        rows = max(1, int(console.height * PANEL_SHARE) - 2)
        columns = max(1, options.max_width - label)
        now = squeezed(self.now, rows, columns)
        for part, new in zip(now, squeezed(self.new, rows, columns), strict=True):
            yield self._row(part, new, label, columns)
        most = max(map(len, self.now))
        each = f"{most} experts, {-(-most // columns)} per column"
        yield Text.assemble(
            (f"across: {each if most > columns else f'{most} experts'}; ", "dim"),
            ("█ all ▒ some", RESIDENT),
            (" in memory, ", "dim"),
            ("█ just loaded", NEW),
        )

    def _row(self, part: Part, new: Part, label: int, columns: int) -> Text:
        layers = part.layers
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        row = Text(f"{name:<{label}}", style="dim")
        cell = max(1, columns // len(part.shares))
        for share, fresh in zip(part.shares, new.shares, strict=True):
            sign = FULLNESS[-(-int(share * 1000) * (len(FULLNESS) - 1) // 1000)]
            wide = sign * (cell - (cell > 2)) + " " * (cell > 2)
            row.append(wide, style=NEW if fresh else RESIDENT)
        return row
