"""Where tensors come from, whatever the format.

Knows: what a checkpoint asks of its weights. Does not know: formats.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHUNK_WEIGHTS = 2**22  # dequantised at a time on the way to a large tensor, to bound memory


class TensorSource(Protocol):
    """Tensors by name. Nothing is read or dequantised before it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what `read` gives."""

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives. Raises `CheckpointError` for one that is not read."""

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index : index + 1]`; only that part is read and dequantised."""
