"""Reads weights that share scales, in float8 or MXFP4, and gives them as bfloat16."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from offload.errors import CheckpointError
from offload.model.formats.safetensors import SafetensorsSource

CHUNK_WEIGHTS = 2**22  # weights of a large tensor that are dequantised at a time
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SUFFIXES = ("_scale_inv", "_scale")  # either name: weight = stored value * scale
BLOCKS, SCALES = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)  # by code
PAIRS = torch.stack([VALUES.repeat(16), VALUES.repeat_interleave(16)], dim=1)  # [256, 2], by byte


class _ScaledSource(ABC):
    """A safetensors source some of whose tensors are dequantised when they are read."""

    def __init__(self, inner: SafetensorsSource) -> None:
        self._inner = inner
        self._parts: dict[str, tuple[str, str]] = {}  # tensor -> its weights and their scales

    def names(self) -> list[str]:
        hidden = {part for parts in self._parts.values() for part in parts}
        return [*(n for n in self._inner.names() if n not in hidden), *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._parts else self._inner.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._read(name, self._inner.read)

    def read_slice(self, name: str, index: int) -> Tensor:
        def read(part: str) -> Tensor:
            if math.prod(self._inner.shape(part)) == 1:  # one scale for all experts
                return self._inner.read(part)
            return self._inner.read_slice(part, index)

        return self._read(name, read)

    def _read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        if name not in self._parts:
            return read(name)
        weights, scales = self._parts[name]
        return self._dequantise(name, read(weights), read(scales))

    @abstractmethod
    def _dequantise(self, name: str, weights: Tensor, scales: Tensor) -> Tensor:
        """The tensor `name` as bfloat16, made of what is stored."""


class Fp8Source(_ScaledSource):
    """A source of float8 weights with a scale for each block, row or tensor.

    A weight `X` has its scales in `X_scale_inv` (DeepSeek-V3, Qwen) or `X_scale`.
    """

    def __init__(self, inner: SafetensorsSource, block: tuple[int, int] | None) -> None:
        """`block` is the config's weight_block_size, the rows and columns that share a scale.

        Raises `CheckpointError` for a float8 tensor whose scale is missing or of another shape.
        """
        super().__init__(inner)
        self._block = block
        names = set(inner.names())
        for name in names:
            if inner.stored_dtype(name) in FLOAT8:
                scales = [name + suffix for suffix in SUFFIXES if name + suffix in names]
                if not scales:
                    raise CheckpointError(
                        f"{name} is float8 and its scale ({name}{SUFFIXES[0]}) is missing: fetch "
                        "the checkpoint again"
                    )
                self._parts[name] = name, scales[0]
                self._grid(name)

    def _grid(self, name: str) -> tuple[int, int, int, int]:
        """Rows and columns of the grid of scales, then those of a block.

        Raises `CheckpointError` when the scales do not fit the weight.
        """
        scales = self._parts[name][1]
        weight, scale = self.shape(name), self._inner.shape(scales)
        rows, columns = (max(size, 1) for size in (1, 1, *weight)[-2:])
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
                f"{scales} has shape {scale}, which does not fit {name} {weight} in blocks of "
                f"{block[0]} x {block[1]}: config.json and weights do not match"
            )
        return *wanted, *block

    def _dequantise(self, name: str, weights: Tensor, scales: Tensor) -> Tensor:
        """weights [..., N, K] float8, scales [..., n, k] or one for each matrix -> bfloat16."""
        n, k, block_rows, block_columns = self._grid(name)
        rows, columns = (1, 1, *weights.shape)[-2:]
        matrices = weights.reshape(math.prod(weights.shape[:-2]), rows, columns)
        factors = _as_float(scales).reshape(-1, n, k).expand(len(matrices), n, k)
        out = torch.empty(matrices.shape, dtype=torch.bfloat16)
        step = max(1, CHUNK_WEIGHTS // (block_rows * max(columns, 1)))  # rows of blocks at a time
        for matrix, values, grid in zip(out, matrices, factors, strict=True):
            for first in range(0, n, step):
                begin, end = first * block_rows, min((first + step) * block_rows, rows)
                factor = grid[first : first + step].repeat_interleave(block_rows, 0)[: end - begin]
                factor = factor.repeat_interleave(block_columns, 1)[:, :columns]
                matrix[begin:end] = values[begin:end].float() * factor
        return out.reshape(weights.shape)


class Mxfp4Source(_ScaledSource):
    """A source of experts in MXFP4, as gpt-oss stores them.

    In MXFP4 (OCP Microscaling Formats v1.0), 32 E2M1 values, two in a byte, share a power of two
    (E8M0). gpt-oss names them `X_blocks` [E, N, K/32, 16] and `X_scales` [E, N, K/32]. Both appear
    as one tensor `X` [E, K, N], which is the model's order.
    """

    def __init__(self, inner: SafetensorsSource) -> None:
        """Raises `CheckpointError` for blocks whose scales are missing or of another shape."""
        super().__init__(inner)
        names = set(inner.names())
        for name in sorted(n.removesuffix(BLOCKS) for n in names if n.endswith(BLOCKS)):
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
            self._parts[name] = name + BLOCKS, name + SCALES

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return super().shape(name)
        experts, rows, groups, half = self._inner.shape(name + BLOCKS)
        return experts, groups * half * 2, rows

    def _dequantise(self, name: str, weights: Tensor, scales: Tensor) -> Tensor:
        pairs = zip(weights.split(1), scales.split(1), strict=True)  # one expert at a time
        return torch.cat([dequantise(*pair) for pair in pairs]).transpose(1, 2)


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [E, N, G, 16] uint8, scales [E, N, G] uint8 -> [E, N, 32 G] bfloat16."""
    values = PAIRS[blocks.int()].flatten(-2)  # [E, N, G, 32]
    return (values * _as_float(scales).unsqueeze(-1)).to(torch.bfloat16).flatten(-2)


def _as_float(scales: Tensor) -> Tensor:
    """Scales as float32; those stored in bytes are exponents (E8M0), of which 255 is NaN."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
