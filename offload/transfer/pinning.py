"""Keeps host memory where it is, so that a GPU can fetch from it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Protocol

import torch

CAN_USE_HOST_POINTER = 91  # the CUdevice_attribute for registered memory
# Pinned for every card and mapped for their kernels: cudaHostRegisterPortable | ...Mapped. With a
# single address space 0 means the same (CUDA Runtime API, cudaHostRegister).
SHARED = 1 | 2
READ_ONLY = 8  # cudaHostRegisterReadOnly: memory that this process may not write either


class Pinner(Protocol):
    """Pins ranges of this process's memory."""

    remedy: str  # what a user can do when it is refused

    def pin(self, address: int, size: int, *, read_only: bool) -> str | None:
        """Pin `size` bytes from `address` on, a page's begin; None, or why that was refused."""

    def unpin(self, address: int, size: int) -> None:
        """Undo a `pin` that was not refused."""


class CudaPinner:
    """Memory registered with CUDA: the copy engine fetches from it, and so can kernels."""

    remedy = (
        "raise the limit of locked memory (ulimit -l), or on Windows/WSL, which pin half of RAM at "
        "most, lower --ram"
    )

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.init()
        self._runtime = torch.cuda.cudart()

    def pin(self, address: int, size: int, *, read_only: bool) -> str | None:
        with torch.cuda.device(self._device):
            code = self._runtime.cudaHostRegister(address, size, SHARED | READ_ONLY * read_only)
            if int(code) == 0:
                return None
            why = f"CUDA error {int(code)}, {self._runtime.cudaGetErrorString(code)}"
            self._clear()
        return why

    def unpin(self, address: int, size: int) -> None:
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


class LockPinner:
    """Memory that the operating system may not page out; there need be no GPU."""

    remedy = "raise the limit of locked memory (ulimit -l), or lower --ram"

    def __init__(self) -> None:
        self._libc = None if os.name == "nt" else ctypes.CDLL(None, use_errno=True)

    def pin(self, address: int, size: int, *, read_only: bool) -> str | None:
        if self._libc is None:
            return "this system has no mlock"
        if self._libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
            return os.strerror(ctypes.get_errno())
        return None

    def unpin(self, address: int, size: int) -> None:
        assert self._libc is not None, "nothing was pinned"
        self._libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
