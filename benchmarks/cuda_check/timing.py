"""Seconds that something takes on a device.

Knows: warm-up, events, medians, graphs. Does not know: what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(
    run: Callable[[], object],
    device: torch.device,
    *,
    rounds: int = 7,
    repeats: int = 1,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of one `run`: the median over `rounds` of `repeats` back to back, after two that warm
    up, where there is more than one round. `before` each round comes what is not timed."""
    times = []
    for round_ in range(-2 if rounds > 1 else 0, rounds):
        before()
        seconds = _seconds(run, device, repeats) / repeats
        if round_ >= 0:
            times.append(seconds)
    return statistics.median(times)


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same as a graph."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()  # kernels are compiled
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def synchronize(device: torch.device) -> None:
    """Return when the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
