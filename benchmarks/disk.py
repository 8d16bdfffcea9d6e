"""Compares ways to read records that are not in memory from a disk.

    python benchmarks/disk.py FOLDER

Writes a file of records into FOLDER, drops it from memory before each run, and prints GB/s and
processor seconds a GB, then GB/s with everything in memory. How far the system reads ahead
(/sys/block/*/queue/read_ahead_kb, usually 128) decides much, so look it up as well.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from offload.transfer.host import PageIn


class Records:
    """A mapped file of records with the methods of a pack that `PageIn` uses."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)

    def record(self, layer: int, expert: int) -> torch.Tensor:
        return self.bytes[expert * self.size : (expert + 1) * self.size]

    def place(self, layer: int, expert: int) -> tuple[Path, int]:
        return self.path, expert * self.size


def touch(records: Records, order: list[int], slots: torch.Tensor) -> None:
    for expert in order:
        source = records.record(0, expert)
        ctypes.memmove(slots[0].data_ptr(), source.data_ptr(), records.size)


def advise(records: Records, order: list[int], slots: torch.Tensor) -> None:
    for expert in order:
        begin = expert * records.size // mmap.PAGESIZE * mmap.PAGESIZE
        records.mapping.madvise(mmap.MADV_WILLNEED, begin, records.size)
        touch(records, [expert], slots)


def page_in(records: Records, order: list[int], slots: torch.Tensor) -> None:
    reader = PageIn(records)  # type: ignore[arg-type]
    for expert in order:
        reader.bring_in(0, expert)
        touch(records, [expert], slots)
    reader.close()


def whole_reads(threads: int) -> Callable[[Records, list[int], torch.Tensor], None]:
    def read(records: Records, order: list[int], slots: torch.Tensor) -> None:
        def one(expert: int) -> None:
            view = memoryview(slots[expert % len(slots)].numpy())
            with records.path.open("rb", buffering=0) as file:
                file.seek(expert * records.size)
                file.readinto(view)

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, order):
                pass

    return read


WAYS = {
    "page faults": touch,
    "madvise WILLNEED": advise,
    "page-in, then copy": page_in,
    **{f"whole records, {n} at once": whole_reads(n) for n in (1, 2, 4, 8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record-mib", type=float, default=1.4)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=4)
    arguments = parser.parse_args()
    size = int(arguments.record_mib * 2**20)
    path = arguments.folder / "records.bin"
    path.write_bytes(os.urandom(size * arguments.records))
    order = list(range(arguments.records))
    random.Random(0).shuffle(order)
    slots = torch.ones(16, size, dtype=torch.uint8)
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repetitions):
        for name, way in WAYS.items():
            records: Any = Records(path, size)
            begin, processor = time.perf_counter(), time.process_time()
            way(records, order, slots)
            cold, processor = time.perf_counter() - begin, time.process_time() - processor
            begin = time.perf_counter()
            way(records, order, slots)
            found[name].append((cold, processor, time.perf_counter() - begin))
    path.unlink()
    size_gb = size * arguments.records / 1e9
    for name, runs in found.items():
        cold, processor, warm = (statistics.median(run[i] for run in runs) for i in range(3))
        print(
            f"{name:26} cold {size_gb / cold:5.2f} GB/s, {processor / size_gb:5.2f} s/GB, "
            f"in memory {size_gb / warm:5.2f} GB/s"
        )


if __name__ == "__main__":
    main()
