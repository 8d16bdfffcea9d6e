"""Figures as lines of text, in the formats that users of llama.cpp and ollama know."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from rich.text import Text

from offload.cache.sharded import Cache
from offload.cache.trace.heatmap import draw_for, of_cache, resident_in, squeezed
from offload.engine.handle import Offload
from offload.engine.stats import Stats
from offload.generation.stream import GenerationResponse
from offload.pack.recipe import bits_name
from offload.quant.pack import Pack, PackInfo
from offload.units import gib


def pack_line(path: Path) -> str:
    """One line about a new pack: its size, its bits, and the command that opens it."""
    with contextlib.closing(Pack(path)) as pack:
        weight = pack.total_bytes * 8 / pack.parameters
        how = f"{weight:.1f} bits a weight, {bits_name(pack.info)}"
        return f"{gib(pack.total_bytes)} ({how}); go on with: offload chat {path}"


def timings(response: GenerationResponse) -> str:
    """The line that llama.cpp prints after an answer."""
    return (
        f"[ Prompt: {response.prompt_tps:.1f} t/s | Generation: {response.generation_tps:.1f} t/s ]"
    )


def verbose_rows(response: GenerationResponse, load_seconds: float) -> str:
    """The rows that ollama prints after an answer. As in ollama, the load duration appears only
    when the answer waited for the model, and the prompt count leaves out tokens from the cache."""
    cached = response.cached_tokens
    read = f"{response.prompt_tokens - cached} token(s)" + (
        f" (+{cached} cached)" if cached else ""
    )
    seconds = load_seconds + response.prompt_seconds + response.generation_seconds
    rows = [
        ("total duration", _duration(seconds)),
        *([("load duration", _duration(load_seconds))] if load_seconds else []),
        ("prompt eval count", read),
        ("prompt eval duration", _duration(response.prompt_seconds)),
        ("prompt eval rate", f"{response.prompt_tps:.2f} tokens/s"),
        ("eval count", f"{response.generation_tokens} token(s)"),
        ("eval duration", _duration(response.generation_seconds)),
        ("eval rate", f"{response.generation_tps:.2f} tokens/s"),
    ]
    return "\n".join(f"{name + ':':<22}{value}" for name, value in rows)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}ms" if seconds < 1 else f"{seconds:.2f}s"


def counters(stats: Stats) -> str:
    """All statistics since the model was loaded, in three lines."""
    counts = stats.counts
    return (
        f"{stats.line()}\n"
        f"requests {counts.requests}, hits {counts.hits}, misses {counts.misses}, "
        f"evictions {counts.evictions}, look-ahead loads {counts.lookahead_loads}\n"
        f"loaded {stats.bytes_loaded / 2**20:.1f} MiB at {stats.link_gb_per_s:.1f} GB/s, "
        f"waited {counts.wait_seconds:.2f} s, {stats.tokens} tokens"
    )


def live_panel(response: GenerationResponse | None, offload: Offload) -> Text:
    """The panel below an answer while it arrives: speed in tokens/s, hits, MiB loaded a token, and
    a map of the resident experts. It takes a few milliseconds for thousands of experts."""
    if response is None:
        return Text()
    counts, info = response.experts.counts, offload.pack.info
    resident = resident_in(offload.engine.cache, [layer.num_experts for layer in info.layers])
    line = (
        f"{response.generation_tokens} tokens, {response.generation_tps:.1f} t/s, "
        f"hits {counts.hit_rate:.1%}, {response.experts.mib_per_token:.1f} MiB/token"
    )
    return Text(f"{line}\n{squeezed(resident)}", style="dim")


def experts_map(cache: Cache, info: PackInfo) -> str:
    """The map of experts for `/show experts`: a row for each layer and a sign for each expert, in
    characters that stdout can show."""
    return draw_for(sys.stdout, of_cache(cache, [layer.num_experts for layer in info.layers]))
