"""Host memory of our own and mapped files, and how their pages are pinned for a GPU."""

import contextlib
import ctypes
import mmap
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
CAN_USE_HOST_POINTER = 91  # the CUdevice_attribute for registered memory
# Pinned for every card and mapped for their kernels: cudaHostRegisterPortable | ...Mapped. With a
# single address space 0 means the same (CUDA Runtime API, cudaHostRegister).
SHARED = 1 | 2
READ_ONLY = 8  # cudaHostRegisterReadOnly: memory that this process may not write either


def pages_of(memory: Tensor) -> tuple[int, int]:
    """Begin and size of the whole pages that `memory` is in."""
    begin = memory.data_ptr() // PAGE * PAGE
    return begin, _in_pages(memory.data_ptr() + memory.nbytes - begin)


def _in_pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def own_memory(size: int) -> Tensor:
    """Memory [size] uint8 that begins on a page, and is freed with its last view.

    It is not taken from torch, whose pinning allocator rounds up to powers of two and whose plain
    one begins anywhere.
    """
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory rarely has large pages
        memory = mmap.mmap(-1, _in_pages(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, _in_pages(size))
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


class CudaPinner:
    """Memory registered with CUDA: the copy engine fetches from it, and so can kernels."""

    remedy = (  # what a user can do when it is refused
        "raise the limit of locked memory (ulimit -l), or on Windows/WSL, which pin half of RAM at "
        "most, lower --ram"
    )

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.init()
        self._runtime = torch.cuda.cudart()

    def pin(self, address: int, size: int, *, read_only: bool) -> str | None:
        """Pin `size` bytes from `address`, the start of a page; None, or why pinning is refused."""
        with torch.cuda.device(self._device):
            code = self._runtime.cudaHostRegister(address, size, SHARED | READ_ONLY * read_only)
            if int(code) == 0:
                return None
            why = f"CUDA error {int(code)}, {self._runtime.cudaGetErrorString(code)}"
            self._clear()
        return why

    def unpin(self, address: int, size: int) -> None:
        """Undo a `pin` that was not refused."""
        with torch.cuda.device(self._device):  # else another card gets a context, in its memory
            if int(self._runtime.cudaHostUnregister(address)):
                self._clear()

    def _clear(self) -> None:
        """Clear the error that CUDA keeps: the next launch would report it as its own."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)


def kernels_read_registered(device: torch.device) -> bool:
    """Whether kernels find registered memory at the address that this process has for it.

    Where they do not, reading there would make every later CUDA call of the process fail (CUDA
    Runtime API, cudaHostRegister).
    """
    answer = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    asked = driver.cuDeviceGetAttribute(
        ctypes.byref(answer), CAN_USE_HOST_POINTER, device.index or 0
    )
    return asked == 0 and answer.value != 0
