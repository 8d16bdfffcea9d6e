"""The most memory used since a moment.

Knows: where the system keeps such a mark and how it is set back. Does not know: what used it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from offload.generation.stream import peak_memory

FORGET = Path("/proc/self/clear_refs")  # "5" sets VmHWM to what is resident now (proc(5))
STATUS = Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Count from here, where the system can do that (Linux, CUDA); else from the start on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            FORGET.write_text("5")


def peak_since(device: torch.device) -> int:
    """Bytes: allocated on a GPU, else resident in this process, mapped files included."""
    if device.type != "cuda":
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = STATUS.read_text().splitlines()
            mark = next(line for line in lines if line.startswith("VmHWM:"))
            return int(mark.split()[1]) * 1024
    return peak_memory(device)
