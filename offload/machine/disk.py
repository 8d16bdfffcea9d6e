"""How fast a folder's disk reads.

Knows: how to keep the page cache from answering in its place. Does not know: what is kept there.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 256 * 2**20
BLOCK_BYTES = 4 * 2**20  # about an expert
READERS = 4  # an NVMe disk needs several requests at a time
MOST_SECONDS = 3.0


@dataclass(frozen=True)
class DiskRate:
    """A measurement, and how the page cache was kept out of it."""

    gb_per_s: float
    how: str


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def read_rate(folder: Path, size: int = FILE_BYTES) -> DiskRate:
    """Read a new file of `size` bytes, a block at a time by several threads. Raises `OSError`."""
    with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".offload-doctor-") as file:
        block = os.urandom(BLOCK_BYTES)  # zeros would be compressed away
        for _ in range(size // BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        try:
            flags = os.O_RDONLY | os.O_DIRECT
            handle, how = os.open(file.name, flags), "past the page cache (O_DIRECT)"
            os.preadv(handle, [mmap.mmap(-1, 4096)], 0)
        except (OSError, AttributeError):  # tmpfs, some network file systems, not Linux
            handle, how = os.open(file.name, os.O_RDONLY), _drop(file.fileno())
        try:
            return DiskRate(_timed(handle, size) / 1e9, how)
        finally:
            os.close(handle)


def _drop(handle: int) -> str:
    """Ask the kernel to forget a file's pages; how sure that is."""
    if not hasattr(os, "posix_fadvise"):
        return "perhaps from the page cache: it cannot be dropped here"
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return "after dropping the page cache (posix_fadvise)"


def _timed(handle: int, size: int) -> float:
    """Bytes a second."""
    begin = time.perf_counter()

    def read(reader: int) -> int:
        buffer = mmap.mmap(-1, BLOCK_BYTES)  # aligned, as O_DIRECT wants
        done = 0
        for offset in range(reader * BLOCK_BYTES, size, READERS * BLOCK_BYTES):
            done += os.preadv(handle, [buffer], offset)
            if time.perf_counter() - begin > MOST_SECONDS:
                break
        return done

    with ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, range(READERS)))
    return done / (time.perf_counter() - begin)
