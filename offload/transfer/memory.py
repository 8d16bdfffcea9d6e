"""Host memory of our own, and files mapped to be read: ranges that can be pinned.

Knows: pages, mappings as tensors. Does not know: what the bytes mean, who pins them.
"""

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
    """Memory [size] uint8 that begins on a page; it is freed with the last view of it.

    Not torch's: its pinning allocator rounds up to powers of two, its plain one begins anywhere.
    """
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory has no large pages as a rule
        memory = mmap.mmap(-1, in_pages(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, in_pages(size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice: fewer pages to pin
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def mapped_file(path: Path) -> Tensor:
    """The bytes [file's size] uint8 of a file, which nobody can write to: the system's own copy."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():  # torch has no tensors that cannot be written to
        warnings.simplefilter("ignore")
        return torch.frombuffer(mapping, dtype=torch.uint8)
