"""Fetching and computing at once: what each loses to the other.

Knows: two streams, the link's before the other, as the device-planned engine has them. Does not
know: who is fetched, or why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.cuda_check.gather import fetching
from benchmarks.cuda_check.products import make_products
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import MIXTRAL, QWEN3, Case
from benchmarks.cuda_check.store import Row
from benchmarks.cuda_check.timing import captured, median_seconds

SCHEME = "4"
FETCHED_BYTES = 2**29
RECORD_BYTES = 2**21
RING_BYTES = 2**29  # of records to compute from: more than a device's cache
CALLS = 12  # in a graph
LONGER = 3.0  # times what is timed: how long the other runs beside it
ROUNDS = 5

Run = Callable[[], None]


def beside_rows(setting: Setting) -> Iterator[Row]:
    """A row for each shape: the gather's rate and a token's products, alone and at once."""
    for case in (MIXTRAL,) if setting.rehearse else (QWEN3, MIXTRAL):
        yield _row(setting, case)


def _row(setting: Setting, case: Case) -> Row:
    device, calls = setting.device, setting.pick(CALLS, 1)
    products = _products(setting, case, calls)
    fetched = setting.pick(FETCHED_BYTES, 2**15)
    fetch = fetching(setting, fetched, setting.pick(RECORD_BYTES, 2**14))
    link = compute = None
    if device.type == "cuda":
        link, compute = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
    alone = _seconds(fetch, link, device), _seconds(products, compute, device)
    beside = (
        _seconds(fetch, link, device, products, compute, alone[0] / alone[1]),
        _seconds(products, compute, device, fetch, link, alone[1] / alone[0]),
    )
    rates = [fetched / seconds / 1e9 for seconds in (alone[0], beside[0])]
    return {
        "kind": "gather beside decode kernels",
        "shape": case.name,
        "gather_gb_s": rates[0],
        "gather_beside_gb_s": rates[1],
        "gather_kept_share": rates[1] / rates[0],
        "products_us": alone[1] / calls * 1e6,
        "products_beside_us": beside[1] / calls * 1e6,
        "products_kept_share": alone[1] / beside[1],
    }


def _products(setting: Setting, case: Case, calls: int) -> Run:
    """A token's products, `calls` times, from records in turn."""
    ring = setting.pick(RING_BYTES, 0)
    made = make_products(
        case, SCHEME, setting.device, case.experts, ring, rehearse=setting.rehearse
    )
    hidden, cells = made.inputs(1)
    tables = [
        ((torch.arange(len(cells)) + call * len(cells)) % len(made.slots)).int().to(setting.device)
        for call in range(calls)
    ]

    def run() -> None:
        for table in tables:
            made.decode(hidden, table, cells)

    return captured(run, setting.device)


def _seconds(
    timed: Run,
    stream: torch.cuda.Stream | None,
    device: torch.device,
    other: Run | None = None,
    others_stream: torch.cuda.Stream | None = None,
    ratio: float = 0.0,
) -> float:
    """Seconds of `timed` in its stream. With `other`, of which `ratio` take as long, that is under
    way in its own stream meanwhile; a CPU does one after the other."""

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if other is not None:
            with _inside(others_stream):
                for _ in range(math.ceil(LONGER * ratio)):
                    other()

    with _inside(stream):
        rounds = ROUNDS if device.type == "cuda" else 1
        return median_seconds(timed, device, rounds=rounds, before=begin)


def _inside(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
