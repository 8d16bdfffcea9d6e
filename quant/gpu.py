"""The way to the GPU's kernels: whether there are any for a device.

Knows: when Triton can be asked. Does not know: matrices, programs, whether results are right.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from contextlib import AbstractContextManager
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

SMALLEST_CAPABILITY = (7, 5)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels launched inside run on `device`: Triton asks which one is in use by this thread, not
    where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def gpu_kernels(device: torch.device) -> ModuleType | None:
    """`quant.kernels.gpu` where it can run on `device`: on CUDA, and on the CPU for tests that have
    set TRITON_INTERPRET=1 before Triton is first imported. Else None, and on CUDA a word why."""
    if device.type != "cuda":
        if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
            return None
    elif torch.cuda.get_device_capability(device) < SMALLEST_CAPABILITY:
        logger.warning("no kernels for GPUs before compute capability 7.5: products will be slow")
        return None
    try:
        import offload.quant.kernels.gpu as kernels
    except ImportError as error:
        logger.warning("no GPU kernels, products will be slow: %s: install triton", error)
        return None
    return kernels
