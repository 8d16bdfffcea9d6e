"""This machine as the simulator sees it: measured, in about a second.

Knows: how to time copies, products and empty calls. Does not know: what is made of the figures
(`cache.simulator`). The disk is not measured: the page cache would answer in its place.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from offload.cache.simulate.machines import Hardware

BLOCK_BYTES = 128 * 2**20  # beyond any cache
RECORD_BYTES = 2 * 2**20  # a usual expert
ROUNDS = 5
NAME = "this machine"


def measure(device: torch.device | None = None) -> Hardware:
    """The machine's rates on `device`, a GPU if there is one."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _measure_gpu(device) if device.type == "cuda" else _measure_cpu()


def _measure_cpu() -> Hardware:
    """Slots in RAM, filled from RAM by one thread; the same cores compute and plan."""
    source = torch.ones(BLOCK_BYTES, dtype=torch.uint8)
    slot = torch.empty(RECORD_BYTES, dtype=torch.uint8)
    turns = itertools.cycle(range(0, BLOCK_BYTES, RECORD_BYTES))

    def copy() -> None:  # as `offload.transfer`: one thread, a record that was not touched lately
        ctypes.memmove(slot.data_ptr(), source.data_ptr() + next(turns), RECORD_BYTES)

    copy_seconds = _median(copy, 8 * ROUNDS)
    small = torch.ones(64, dtype=torch.uint8)
    launch = _median(lambda: small.add_(1), 64)
    rows = BLOCK_BYTES // 2 // 4096
    weights = torch.ones(rows, 4096, dtype=torch.bfloat16)
    one, many = (
        torch.ones(1, 4096, dtype=torch.bfloat16),
        torch.ones(64, 4096, dtype=torch.bfloat16),
    )
    read = _median(lambda: torch.nn.functional.linear(one, weights), ROUNDS)
    product = _median(lambda: torch.nn.functional.linear(many, weights), ROUNDS)
    threads = torch.get_num_threads()
    return Hardware(
        f"{NAME} (CPU, {threads} thread{'s' * (threads != 1)})",
        memory_gb_per_s=weights.nbytes / read / 1e9,
        link_gb_per_s=RECORD_BYTES / copy_seconds / 1e9,
        ram_gb_per_s=RECORD_BYTES / copy_seconds / 1e9,
        link_latency_seconds=launch,  # handing a copy to the copy thread
        launch_seconds=launch,
        tflops=2 * 64 * weights.numel() / product / 1e12,
        runs_ahead=False,
    )


def _measure_gpu(device: torch.device) -> Hardware:
    """Slots in GPU memory, filled from pinned RAM."""
    host = torch.ones(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    block = torch.ones(BLOCK_BYTES, dtype=torch.uint8, device=device)

    def timed(run: Callable[[], object], rounds: int) -> float:
        def synced() -> None:
            run()
            torch.cuda.synchronize(device)

        return _median(synced, rounds)

    tiny_host, tiny = host[:64], block[:64]
    latency = timed(lambda: tiny.copy_(tiny_host, non_blocking=True), 64)
    copy = timed(lambda: block.copy_(host, non_blocking=True), ROUNDS)
    weights = block.view(torch.bfloat16).view(-1, 4096)
    one = torch.ones(4096, 1, dtype=torch.bfloat16, device=device)
    many = torch.ones(4096, 512, dtype=torch.bfloat16, device=device)
    read = timed(lambda: weights @ one, ROUNDS)
    product = timed(lambda: weights @ many, ROUNDS)
    launch = _median(lambda: tiny.add_(1), 256)
    torch.cuda.synchronize(device)
    ram = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    ram_copy = _median(lambda: ram.copy_(host), ROUNDS)
    return Hardware(
        f"{NAME} ({torch.cuda.get_device_name(device)})",
        memory_gb_per_s=BLOCK_BYTES / (read - min(latency, read / 2)) / 1e9,
        link_gb_per_s=BLOCK_BYTES / (copy - min(latency, copy / 2)) / 1e9,
        ram_gb_per_s=2 * BLOCK_BYTES / ram_copy / 1e9,  # read and written
        link_latency_seconds=latency,
        launch_seconds=launch,
        tflops=2 * 512 * weights.numel() / product / 1e12,
    )


def _median(run: Callable[[], object], rounds: int) -> float:
    """Seconds of one `run`, the first not counted."""
    run()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
