"""The rates that stand beside a speed: the link's, the memory's.

Knows: how to time copies without disturbing the cache, and a sum over a large block. Does not know:
what is compared with them.
"""

from __future__ import annotations

import functools
import time

import torch

from offload.bench.sample import sync
from offload.engine.engine import Engine

BLOCK_BYTES = 256 * 2**20  # beyond most caches
ROUNDS = 8


def measure_link(engine: Engine, copies: int = 64) -> float:
    """GB/s of whole records copied back to back: the ceiling that loads stand beside."""
    transfer, layer = engine.transfer, engine.layers[0]
    held = engine.cache.table.key_in(0)
    experts = [i % layer.num_experts for i in range(layer.num_experts + copies)]

    def copy(chosen: list[int]) -> float:
        tickets = [transfer.start(layer.index, expert, 0, urgent=True) for expert in chosen]
        for ticket in tickets:
            transfer.wait(ticket)
        sync(transfer.device)
        return transfer.busy_seconds

    try:
        before = copy(experts[: layer.num_experts])  # the first touch reads the disk, checks sums
        seconds = copy(experts[layer.num_experts :]) - before
    finally:
        if held is not None:
            transfer.wait(transfer.start(*held, 0, urgent=True))
    return copies * engine.record_bytes(layer.index) / 1e9 / seconds


@functools.cache
def measure_memory(device: torch.device) -> float:
    """GB/s at which all of `device`'s compute reads its memory: the best of a few sums."""
    block = torch.ones(BLOCK_BYTES // 4, device=device)
    seconds = []
    for _ in range(ROUNDS):
        sync(device)
        begin = time.perf_counter()
        block.sum()
        sync(device)
        seconds.append(time.perf_counter() - begin)
    return block.nbytes / 1e9 / min(seconds)
