"""Host memory of our own, and files mapped for reading: ranges that can be pinned."""

from __future__ import annotations

import contextlib
import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def in_pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def own_memory(size: int) -> Tensor:
    """Memory [size] uint8 that begins on a page, and is freed with its last view.

    It is not taken from torch, whose pinning allocator rounds up to powers of two and whose plain
    one begins anywhere.
    """
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory rarely has large pages
        memory = mmap.mmap(-1, in_pages(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, in_pages(size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # only advice: with large pages there are fewer to pin
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def mapped_file(path: Path) -> Tensor:
    """The bytes [size of the file] uint8 of a file in the system's own memory, read-only."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():  # torch warns that its tensors can be written to
        warnings.simplefilter("ignore")
        return torch.frombuffer(mapping, dtype=torch.uint8)
