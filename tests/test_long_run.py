"""Long runs: memory stays flat, counters agree, nothing is left behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import offload
from offload.chat.chat import Chat
from offload.chat.display import Plain
from offload.engine.handle import offload_of
from offload.sampling import Sampling

TURNS, TOKENS, CONTEXT = 50, 40, 256
WARM_UP = 10  # turns: until the context is full and turns leave it


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the line with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def _handles() -> tuple[set[str], int]:
    """Names of this process's threads, and how many files it has open."""
    return {thread.name for thread in threading.enumerate()}, len(
        list(Path("/proc/self/fd").iterdir())
    )


def _long_chat(pack: Path, turns: int) -> float:
    """MiB per 1,000 tokens by which a chat of so many turns grows."""
    model, tokenizer = offload.load(
        pack, device="cpu", dtype=torch.float32, expert_slots=3, context=CONTEXT, trace=None
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    chat = Chat(model, tokenizer, Sampling(1.0, seed=1), Plain(lambda _: None))
    chat.max_new_tokens, chat.timings = TOKENS, False
    process, grown, tokens = psutil.Process(), [], 0
    engine = offload_of(model).engine
    for turn in range(turns):
        chat.say(f"turn {turn}: tell me more")
        response = chat.last
        assert response is not None
        tokens += response.generation_tokens
        stats = model.offload.stats()
        for index, layer in enumerate(stats.layers):
            assert layer.hits + layer.misses == layer.requests
            assert layer.loads >= layer.misses > 0, f"layer {index}"
        loaded = sum(n.loads * engine.record_bytes(i) for i, n in enumerate(stats.layers))
        assert stats.bytes_loaded == loaded
        engine.cache.check_integrity()
        if turn >= min(WARM_UP, turns // 2):
            gc.collect()
            grown.append((tokens / 1000, process.memory_info().rss / 2**20))
    assert chat.begin > 0, "the context was never full"
    assert tokens > 0.8 * turns * TOKENS
    model.offload.close()
    return _slope(grown)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_a_chat_leaves_neither_threads_nor_files(mixtral_pack: Path) -> None:
    _long_chat(mixtral_pack, WARM_UP)  # what is made once for all, is there now
    gc.collect()
    before = _handles()
    _long_chat(mixtral_pack, WARM_UP)
    gc.collect()
    assert _handles() == before


@pytest.mark.long
def test_memory_stays_flat_over_two_thousand_tokens(mixtral_pack: Path) -> None:
    slope = _long_chat(mixtral_pack, TURNS)
    print(f"grew by {slope:.2f} MiB per 1,000 tokens")
    assert slope < 1.0
