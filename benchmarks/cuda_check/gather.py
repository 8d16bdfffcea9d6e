"""The gather kernel's rate over the link, beside memcpy's.

Knows: how the device-planned engine's gather is launched. Does not know: who asks it for what.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        from offload.device import gather as module
    except ImportError as error:
        raise NotBuiltError(str(error)) from None
    total = setting.pick(2**29, 2**17)
    for name, real_bytes in sizes.items():
        size = setting.pick(real_bytes, 2**14)
        count = max(2, total // size)
        host = torch.empty(count, size, dtype=torch.uint8, pin_memory=not setting.rehearse)
        host.random_(0, 256)
        slots = torch.zeros(count, size, dtype=torch.uint8, device=setting.device)
        experts, loads, addresses = _table(host, setting.device)
        for programs in PROGRAMS[:1] if setting.rehearse else PROGRAMS:

            def gather(programs: int = programs, size: int = size, slots: Tensor = slots) -> None:
                module.gather_kernel[(programs,)](
                    experts,  # noqa: B023
                    loads,  # noqa: B023
                    addresses,  # noqa: B023
                    slots.view(torch.int64),
                    size // 8,
                    size // 8,
                    count,  # noqa: B023
                    WORDS=module.WORDS,
                    num_warps=module.WARPS,
                )

            seconds = median_seconds(gather, setting.device, rounds=setting.pick(5, 1))
            right = bool((slots.cpu() == host.flip(0)).all())
            rate = count * size / seconds / 1e9
            yield {
                "kind": "gather kernel",
                "record": name,
                "mib": round(size / 2**20, 2),
                "programs": programs,
                "used": programs == module.BLOCKS,
                "right": right,
                "gb_s": rate,
                "of_memcpy_share": rate / memcpy_gb_per_s,
                "target": f"{TARGET:.0%}",
            }


def _table(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, slots in which they come in turned order, and addresses of the records."""
    count = len(host)
    experts = torch.arange(count, dtype=torch.int32, device=device)
    addresses = torch.tensor([record.data_ptr() for record in host], device=device)
    return experts, experts.flip(0), addresses
