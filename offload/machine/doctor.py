"""RAM, how much of it may be pinned, and the disk where packs are kept.

Knows: sizes and rates, which are slow. Does not know: GPUs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from offload.budget.budget import gib
from offload.home import short
from offload.machine.disk import existing, read_rate
from offload.machine.finding import MISSING, OK, SLOW, Finding
from offload.machine.measure import measure
from offload.machine.processor import BUSY, programs_a_core

LITTLE_RAM = 2**30
# One channel of DDR4-2400 carries 19 GB/s, and what is copied is read and written.
SLOW_COPY_GB_PER_S = 6.0
SLOW_DISK_GB_PER_S = 1.0  # SATA reaches 0.55, an NVMe disk of PCIe 3 about 3
LITTLE_DISK = 20 * 2**30


def memory() -> Iterator[Finding]:
    """RAM: how much, how fast."""
    now = psutil.virtual_memory()
    yield Finding(
        "RAM",
        f"{gib(now.total)}, {gib(now.available)} free",
        data={"total_bytes": now.total, "available_bytes": now.available},
    )
    if now.available < LITTLE_RAM:
        yield Finding("RAM copies", "not measured", SLOW, "RAM is nearly full: close programs")
        return
    rates = measure(torch.device("cpu"))
    threads = torch.get_num_threads()
    copies, products = rates.link_gb_per_s, rates.memory_gb_per_s
    slow = copies < SLOW_COPY_GB_PER_S
    yield Finding(
        "RAM copies",
        f"{copies:.1f} GB/s by one thread, an expert at a time",
        SLOW if slow else OK,
        _slow_copies() if slow else "",
        {"gb_per_s": copies},
    )
    yield Finding(
        "RAM products",
        f"weights read at {products:.1f} GB/s, {threads} thread{'s' * (threads != 1)}",
        data={"gb_per_s": products},
    )


def _slow_copies() -> str:
    """What else runs comes before what the machine is made of."""
    modules = "fill both memory channels, set the profile in the BIOS"
    if programs_a_core() > BUSY:
        return f"the machine is busy: look again when it is idle; if copies stay slow, {modules}"
    return f"{modules}, close what else runs"


def pin_limit(has_gpu: bool) -> Iterator[Finding]:
    """How much memory the system lets a program lock."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else gib(limit)
    data = {"memlock_bytes": None if unlimited else limit}
    enough = unlimited or limit >= psutil.virtual_memory().total // 2
    if enough or not has_gpu:
        yield Finding("pin limit", text if has_gpu else f"{text}; used with a GPU only", data=data)
        return
    yield Finding(
        "pin limit",
        f"{text} (ulimit -l)",
        SLOW,
        "if pinning fails: `* - memlock unlimited` in /etc/security/limits.conf, log in again",
        data,
    )


def disk(home: Path) -> Iterator[Finding]:
    """The disk where packs are kept."""
    place = existing(home)
    free = shutil.disk_usage(place).free
    yield Finding(
        "disk space",
        f"{gib(free)} free at {short(place)}",
        MISSING if free < LITTLE_DISK else OK,
        "free some, or name another place with OFFLOAD_HOME" if free < LITTLE_DISK else "",
        {"free_bytes": free},
    )
    try:
        rate = read_rate(place)
    except OSError as error:
        remedy = "name a place that can be written with OFFLOAD_HOME"
        why = f"{short(place)} cannot be written ({error.strerror or error})"
        yield Finding("disk reads", f"not measured: {why}", MISSING, remedy)
        return
    slow = rate.gb_per_s < SLOW_DISK_GB_PER_S
    yield Finding(
        "disk reads",
        f"{rate.gb_per_s:.2f} GB/s, {rate.how}",
        SLOW if slow else OK,
        "experts that RAM does not hold wait for it: an NVMe disk (OFFLOAD_HOME), or fewer bits"
        if slow
        else "",
        {"gb_per_s": rate.gb_per_s, "how": rate.how},
    )
