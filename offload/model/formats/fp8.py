"""Reads float8 weights with a scale for each block, row or tensor, and gives them as bfloat16.

A weight `X` has its scales in `X_scale_inv` (DeepSeek-V3, Qwen) or `X_scale`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offload.errors import CheckpointError
from offload.model.formats.safetensors import SafetensorsSource
from offload.model.formats.source import CHUNK_WEIGHTS

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SUFFIXES = ("_scale_inv", "_scale")  # both are multiplied with; "inv" is the quantiser's view


class Fp8Source:
    """A safetensors source whose float8 tensors are dequantised when they are read."""

    def __init__(self, inner: SafetensorsSource, block: tuple[int, int] | None) -> None:
        """`block` is the config's weight_block_size, the rows and columns that share a scale.

        Raises `CheckpointError` for a float8 tensor whose scale is missing or of another shape.
        """
        self._inner = inner
        self._block = block
        self._scale_of: dict[str, str] = {}
        names = set(inner.names())
        for name in names:
            if inner.stored_dtype(name) in FLOAT8:
                scales = [name + suffix for suffix in SUFFIXES if name + suffix in names]
                if not scales:
                    raise CheckpointError(
                        f"{name} is float8 and its scale ({name}{SUFFIXES[0]}) is missing: fetch "
                        "the checkpoint again"
                    )
                self._scale_of[name] = scales[0]
                self._grid(name)

    def names(self) -> list[str]:
        hidden = set(self._scale_of.values())
        return [name for name in self._inner.names() if name not in hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._scale_of else self._inner.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._scale_of:
            return self._inner.read(name)
        return self._dequantise(
            name, self._inner.read(name), self._inner.read(self._scale_of[name])
        )

    def read_slice(self, name: str, index: int) -> Tensor:
        weight = self._inner.read_slice(name, index)
        if name not in self._scale_of:
            return weight
        scale = self._scale_of[name]
        one = math.prod(self._inner.shape(scale)) == 1  # one factor for all experts
        factors = self._inner.read(scale) if one else self._inner.read_slice(scale, index)
        return self._dequantise(name, weight, factors)

    def _grid(self, name: str) -> tuple[int, int, int, int]:
        """Rows and columns of the grid of scales, then those of a block.

        Raises `CheckpointError` when the scales do not fit the weight.
        """
        weight, scale = self.shape(name), self._inner.shape(self._scale_of[name])
        rows, columns = (1, *weight)[-2:]
        if math.prod(scale) == 1 or (
            len(weight) == 3 and scale[:1] == weight[:1] and math.prod(scale) == weight[0]
        ):
            return 1, 1, rows, columns  # one factor for a matrix
        found = (*scale, 1)[:2] if len(scale) < 2 else scale[-2:]
        block = self._block or (-(-rows // max(found[0], 1)), -(-columns // max(found[1], 1)))
        wanted = (-(-rows // block[0]), -(-columns // block[1]))
        leading = scale[:-2] == weight[:-2]
        even = self._block is not None or (rows % block[0] == 0 and columns % block[1] == 0)
        if found != wanted or not leading or not even:
            raise CheckpointError(
                f"{self._scale_of[name]} has shape {scale}, which does not fit {name} {weight} in "
                f"blocks of {block[0]} x {block[1]}: config.json and weights do not match"
            )
        return *wanted, *block

    def _dequantise(self, name: str, weight: Tensor, scale: Tensor) -> Tensor:
        """weight [..., N, K] float8 and scale [..., n, k] or one for each matrix -> bfloat16."""
        n, k, block_rows, block_columns = self._grid(name)
        rows, columns = (1, *weight.shape)[-2:]
        weights = weight.reshape(-1, rows, columns)
        factors = _as_float(scale).reshape(-1, n, k).expand(len(weights), n, k)
        out = torch.empty(weights.shape, dtype=torch.bfloat16)
        step = max(1, CHUNK_WEIGHTS // (block_rows * columns))  # rows of blocks at a time
        for matrix, values, grid in zip(out, weights, factors, strict=True):
            for first in range(0, n, step):
                begin, end = first * block_rows, min((first + step) * block_rows, rows)
                factor = grid[first : first + step].repeat_interleave(block_rows, 0)[: end - begin]
                factor = factor.repeat_interleave(block_columns, 1)[:, :columns]
                matrix[begin:end] = values[begin:end].float() * factor
        return out.reshape(weight.shape)


def _as_float(scale: Tensor) -> Tensor:
    """Scales as float32; those stored in bytes are exponents (E8M0)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()
