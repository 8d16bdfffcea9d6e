"""Measures this machine's rates of copies, products, kernel launches and disk reads."""

import ctypes
import itertools
import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from offload.files import existing
from offload.machine.hardware import Hardware

FILE_BYTES = 256 * 2**20
DISK_BLOCK_BYTES = 4 * 2**20  # about the size of an expert
READERS = 4  # an NVMe disk reaches its speed only with several requests at a time
MOST_SECONDS = 3.0


@dataclass(frozen=True)
class DiskRate:
    """A disk's measured rate, and how the page cache was kept out of the measurement."""

    gb_per_s: float
    how: str


def read_rate(folder: Path, size: int = FILE_BYTES) -> DiskRate:
    """Time several threads that read a new file of `size` bytes in blocks. Raises `OSError`."""
    with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".offload-doctor-") as file:
        block = os.urandom(DISK_BLOCK_BYTES)  # some disks would compress zeros
        for _ in range(size // DISK_BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        try:
            flags = os.O_RDONLY | os.O_DIRECT
            handle, how = os.open(file.name, flags), "past the page cache (O_DIRECT)"
            os.preadv(handle, [mmap.mmap(-1, 4096)], 0)
        except (OSError, AttributeError):  # tmpfs, some network file systems, other systems
            handle, how = os.open(file.name, os.O_RDONLY), _drop(file.fileno())
        try:
            return DiskRate(_timed(handle, size) / 1e9, how)
        finally:
            os.close(handle)


def _drop(handle: int) -> str:
    """Ask the system to drop a file from the page cache; return how the file is read then."""
    if not hasattr(os, "posix_fadvise"):
        return "perhaps from the page cache: it cannot be dropped here"
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return "after dropping the page cache (posix_fadvise)"


def _timed(handle: int, size: int) -> float:
    """Read `size` bytes and return how many were read a second."""
    begin = time.perf_counter()

    def read(reader: int) -> int:
        buffer = mmap.mmap(-1, DISK_BLOCK_BYTES)  # aligned, as O_DIRECT wants
        done = 0
        for offset in range(reader * DISK_BLOCK_BYTES, size, READERS * DISK_BLOCK_BYTES):
            done += os.preadv(handle, [buffer], offset)
            if time.perf_counter() - begin > MOST_SECONDS:
                break
        return done

    with ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, range(READERS)))
    return done / (time.perf_counter() - begin)


BLOCK_BYTES = 128 * 2**20  # larger than any cache
RECORD_BYTES = 2 * 2**20  # a typical expert
ROUNDS = 5
NAME = "this machine"


def measure(device: torch.device | None = None) -> Hardware:
    """Measure the rates on `device`, by default a GPU if there is one, in about a second.

    The disk is not measured, because the page cache would answer in its place.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _measure_gpu(device) if device.type == "cuda" else _measure_cpu()


def _measure_cpu() -> Hardware:
    """Measure the rates for expert slots in RAM that one thread fills from RAM."""
    source = torch.ones(BLOCK_BYTES, dtype=torch.uint8)
    slot = torch.empty(RECORD_BYTES, dtype=torch.uint8)
    turns = itertools.cycle(range(0, BLOCK_BYTES, RECORD_BYTES))

    def copy() -> None:  # like `offload.transfer`, in one thread, a record that no cache holds
        ctypes.memmove(slot.data_ptr(), source.data_ptr() + next(turns), RECORD_BYTES)

    copy_seconds = _median(copy, 8 * ROUNDS)
    small = torch.ones(64, dtype=torch.uint8)
    launch = _median(lambda: small.add_(1), 64)
    rows = BLOCK_BYTES // 2 // 4096
    weights = torch.ones(rows, 4096, dtype=torch.bfloat16)
    one = torch.ones(1, 4096, dtype=torch.bfloat16)
    read = _median(lambda: torch.nn.functional.linear(one, weights), ROUNDS)
    threads = torch.get_num_threads()
    return Hardware(
        f"{NAME} (CPU, {threads} thread{'s' * (threads != 1)})",
        memory_gb_per_s=weights.nbytes / read / 1e9,
        link_gb_per_s=RECORD_BYTES / copy_seconds / 1e9,
        ram_gb_per_s=RECORD_BYTES / copy_seconds / 1e9,
        link_latency_seconds=launch,  # what it takes to hand a copy to the copy thread
        launch_seconds=launch,
        runs_ahead=False,
    )


def _measure_gpu(device: torch.device) -> Hardware:
    """Measure the rates for expert slots in GPU memory that are filled from pinned RAM."""
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
    read = timed(lambda: weights @ one, ROUNDS)
    launch = _median(lambda: tiny.add_(1), 256)
    torch.cuda.synchronize(device)
    ram = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    ram_copy = _median(lambda: ram.copy_(host), ROUNDS)
    return Hardware(
        f"{NAME} ({torch.cuda.get_device_name(device)})",
        memory_gb_per_s=BLOCK_BYTES / (read - min(latency, read / 2)) / 1e9,
        link_gb_per_s=BLOCK_BYTES / (copy - min(latency, copy / 2)) / 1e9,
        ram_gb_per_s=2 * BLOCK_BYTES / ram_copy / 1e9,  # a copy reads and writes
        link_latency_seconds=latency,
        launch_seconds=launch,
    )


def _median(run: Callable[[], object], rounds: int) -> float:
    """The median time in seconds of `rounds` runs, after one run that is not counted."""
    run()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


CPUINFO = Path("/proc/cpuinfo")
BUSY = 0.5  # running programs per core; with more of them, measured rates are too low


def about_processor() -> dict[str, str]:
    """What Linux says about the first core; empty on other systems."""
    try:
        first = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """The processor's usual name if the system tells it, else its architecture, like x86_64."""
    return about_processor().get("model name") or platform.processor() or platform.machine()


def programs_a_core() -> float:
    """How many programs per core were running in the last minute, on average."""
    return psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
