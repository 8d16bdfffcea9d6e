"""Reads experts in MXFP4, as gpt-oss stores them, and gives them as bfloat16.

In MXFP4 (OCP Microscaling Formats v1.0), 32 E2M1 values, two in a byte, share a power of two
(E8M0). gpt-oss names them `X_blocks` [E, N, K/32, 16] and `X_scales` [E, N, K/32].
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.errors import CheckpointError
from offload.model.formats.safetensors import SafetensorsSource

BLOCKS, SCALES = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)  # by code
PAIRS = torch.stack(
    [VALUES.repeat(16), VALUES.repeat_interleave(16)], dim=1
)  # [256, 2]: byte -> values


class Mxfp4Source:
    """A safetensors source whose MXFP4 tensors are dequantised when they are read.

    `X_blocks` and `X_scales` appear as one tensor `X` [E, K, N], which is the model's order.
    """

    def __init__(self, inner: SafetensorsSource) -> None:
        """Raises `CheckpointError` for blocks whose scales are missing or of another shape."""
        self._inner = inner
        names = set(inner.names())
        self._packed = {n.removesuffix(BLOCKS) for n in names if n.endswith(BLOCKS)}
        for name in self._packed:
            if name + SCALES not in names:
                raise CheckpointError(
                    f"{name}{BLOCKS} is there and {name}{SCALES} is missing: fetch the checkpoint "
                    "again"
                )
            blocks, scales = inner.shape(name + BLOCKS), inner.shape(name + SCALES)
            dtypes = {inner.stored_dtype(name + suffix) for suffix in (BLOCKS, SCALES)}
            if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scales:
                raise CheckpointError(
                    f"{name}{SCALES} has shape {scales} where the blocks {blocks} ask for "
                    f"{blocks[:3]}, 16 bytes each: fetch the checkpoint again"
                )
            if dtypes != {torch.uint8}:
                raise CheckpointError(f"{name}{BLOCKS} is not stored as bytes: it is not MXFP4")

    def names(self) -> list[str]:
        hidden = {name + suffix for name in self._packed for suffix in (BLOCKS, SCALES)}
        return [*(n for n in self._inner.names() if n not in hidden), *sorted(self._packed)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._inner.shape(name)
        experts, rows, groups, half = self._inner.shape(name + BLOCKS)
        return experts, groups * half * 2, rows

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._packed else self._inner.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._inner.read(name)
        return torch.cat([self.read_slice(name, index) for index in range(self.shape(name)[0])])

    def read_slice(self, name: str, index: int) -> Tensor:
        if name not in self._packed:
            return self._inner.read_slice(name, index)
        blocks = self._inner.read_slice(name + BLOCKS, index)
        scales = self._inner.read_slice(name + SCALES, index)
        return dequantise(blocks, scales).transpose(1, 2)


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [E, N, G, 16] uint8, scales [E, N, G] uint8 -> [E, N, 32 G] bfloat16."""
    values = PAIRS[blocks.int()].flatten(-2)  # [E, N, G, 32]
    factors = scales.view(torch.float8_e8m0fnu).float()  # 255 is not a number
    return (values * factors.unsqueeze(-1)).to(torch.bfloat16).flatten(-2)
