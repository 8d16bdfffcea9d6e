"""The gather kernel's rate over the link, beside memcpy's.

Knows: how the device-planned engine's gather is launched. Does not know: who asks it for what.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cuda_check.attempt import NotBuiltError
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Row
from benchmarks.cuda_check.timing import median_seconds

PROGRAMS = (4, 8, 16, 32)
TARGET = 0.90  # of memcpy


def gather_rates(setting: Setting, memcpy_gb_per_s: float, sizes: dict[str, int]) -> Iterator[Row]:
    """A row for each kind of record and number of programs. Raises `NotBuiltError`."""
    try:
        from offload.engine.device import gather as module
    except ImportError as error:
        raise NotBuiltError(str(error)) from None
    total = setting.pick(2**29, 2**17)
    for name, real_bytes in sizes.items():
        size = setting.pick(real_bytes, 2**14)
        host = _records(max(2, total // size), size, pinned=not setting.rehearse)
        expected = host.flip(0).to(setting.device)
        slots = torch.zeros_like(expected)
        for programs in PROGRAMS[:1] if setting.rehearse else PROGRAMS:
            run = functools.partial(_gather, host, slots, programs)
            seconds = median_seconds(run, setting.device, rounds=setting.pick(5, 1))
            rate = host.nbytes / seconds / 1e9
            yield {
                "kind": "gather kernel",
                "record": name,
                "mib": round(size / 2**20, 2),
                "programs": programs,
                "used": programs == module.BLOCKS,
                "right": torch.equal(slots, expected),
                "gb_s": rate,
                "of_memcpy_share": rate / memcpy_gb_per_s,
                "target": f"{TARGET:.0%}",
            }
            slots.zero_()


def _records(count: int, size: int, *, pinned: bool) -> Tensor:
    """Random records [count, size] uint8 in host memory."""
    host = torch.empty(count, size, dtype=torch.uint8, pin_memory=pinned)
    host.view(torch.int64).random_()
    return host


def _gather(host: Tensor, slots: Tensor, programs: int) -> None:
    """All records of `host` at once, in turned order."""
    from offload.engine.device.gather import WARPS, WORDS, gather_kernel

    count, size = host.shape
    experts = torch.arange(count, dtype=torch.int32, device=slots.device)
    addresses = host.data_ptr() + size * torch.arange(count, device=slots.device)
    gather_kernel[(programs,)](
        experts,
        experts.flip(0),
        addresses,
        slots.view(torch.int64),
        size // 8,
        size // 8,
        count,
        WORDS=WORDS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def fetching(setting: Setting, total: int, size: int) -> Callable[[], None]:
    """What fetches `total` bytes, in records of `size`, as the engine does. Raises
    `NotBuiltError`."""
    try:
        from offload.engine.device.gather import gather
    except ImportError as error:
        raise NotBuiltError(str(error)) from None
    host = _records(total // size, size, pinned=not setting.rehearse)
    slots = torch.zeros(host.shape, dtype=torch.uint8, device=setting.device)
    experts = torch.arange(len(host), dtype=torch.int32, device=setting.device)
    addresses = host.data_ptr() + size * torch.arange(len(host), device=setting.device)

    def run() -> None:
        gather(experts, experts, addresses, slots, host.shape[1])

    return run
