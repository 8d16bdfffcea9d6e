"""Rates of the link and of the device's memory, the ceilings that everything else stands beside.

Knows: memcpy both ways, pinned and pageable, in bulk and record by record; device copies; which
kernels of the device-planned engine are measured here. Does not know: models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cuda_check.about import link_now
from benchmarks.cuda_check.attempt import attempt, need_time
from benchmarks.cuda_check.beside import beside_rows
from benchmarks.cuda_check.gather import gather_rates
from benchmarks.cuda_check.planning import planning_rows
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Part
from benchmarks.cuda_check.timing import median_seconds

RECORD_BYTES = {"Mixtral-8x7B": 99_090_432, "gpt-oss-120b": 14_051_328, "Qwen3-30B-A3B": 2_654_208}
BESIDE_SECONDS = 8.0  # of which most goes into compiling


def run(setting: Setting, part: Part) -> None:
    """Measure the link; `rates` in GB/s are kept for the other parts."""
    size = setting.pick(2**30, 2**20)
    rates: dict[str, float] = {}
    device = setting.device
    on_device = torch.ones(size, dtype=torch.uint8, device=device)
    with attempt(part, "device copy"):
        copy = _copying(torch.empty_like(on_device), on_device)
        seconds = median_seconds(copy, device, repeats=4)
        del copy
        rates["device_copy"] = 2 * size / seconds / 1e9  # read and written
        part.set("rates", rates)
        part.add({"kind": "memory", "what": "device copy", "gb_s": rates["device_copy"]})
        part.note("device copy counts bytes read and bytes written: the memory's whole traffic")
    for memory in ("pinned", "pageable"):
        with attempt(part, f"memcpy, {memory}"):
            pin = memory == "pinned" and device.type == "cuda"
            host = torch.ones(size, dtype=torch.uint8, pin_memory=pin)
            for way, target, source in (("h2d", on_device, host), ("d2h", host, on_device)):
                seconds = median_seconds(_copying(target, source), device, rounds=5)
                rates[f"{way}_{memory}"] = size / seconds / 1e9
                part.set("rates", rates)
                part.add(
                    {
                        "kind": "memcpy",
                        "way": "host to device" if way == "h2d" else "device to host",
                        "host_memory": memory,
                        "mib": size // 2**20,
                        "gb_s": size / seconds / 1e9,
                    }
                )
            if memory == "pinned":
                part.set("link_under_load", link_now())
                _records(setting, part, host, on_device, rates["h2d_pinned"])
            del host
    with attempt(part, "gather kernel"):
        for row in gather_rates(setting, rates["h2d_pinned"], RECORD_BYTES):
            part.add(row)
    with attempt(part, "planning kernels"):
        for row in planning_rows(setting):
            part.add(row)
    with attempt(part, "gather beside decode kernels"):
        need_time(setting, BESIDE_SECONDS)
        for row in beside_rows(setting):
            part.add(row)


def _copying(target: Tensor, source: Tensor) -> Callable[[], Tensor]:
    return lambda: target.copy_(source, non_blocking=True)


def _records(
    setting: Setting, part: Part, host: Tensor, on_device: Tensor, bulk_gb_per_s: float
) -> None:
    """memcpy of one record after the other, each to another place."""
    for name, real_bytes in RECORD_BYTES.items():
        size = setting.pick(real_bytes, 2**16)
        pieces = list(range(0, len(host) - size + 1, size))

        def copy(size: int = size, pieces: list[int] = pieces) -> None:
            for at, to in zip(pieces, reversed(pieces), strict=True):
                on_device[to : to + size].copy_(host[at : at + size], non_blocking=True)

        rate = len(pieces) * size / median_seconds(copy, setting.device, rounds=3) / 1e9
        part.add(
            {
                "kind": "memcpy of records",
                "record": name,
                "mib": round(size / 2**20, 2),
                "gb_s": rate,
                "of_bulk_share": rate / bulk_gb_per_s,
            }
        )
