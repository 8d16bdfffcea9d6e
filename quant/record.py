"""The expert record: one expert as one contiguous, aligned run of bytes.

A `RecordLayout` says where an expert's codes, scales and biases lie; a model's name plays no part.
Every matrix is stored as [out, in], whatever the checkpoint's orientation. Scales are pairs
`(scale, offset)` of shape [K/g, N, 2], as bfloat16 or as bytes that count steps (`quant.codes`).

Letters: N rows, K columns, g columns of a group, s groups that share a step, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offload.quant.codes import STEP_VALUES, TILE_ROWS, padded_rows, shared_steps
from offload.quant.scheme import GROUP_SIZES, SMALLEST_GROUP, Scheme

ALIGNMENT = 256  # bytes; more than any vector load or copy engine asks for
STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MatrixLayout:
    """Where one matrix [rows, columns] = [out, in] of an expert lies.

    Offsets are bytes from the record's start.
    """

    name: str
    rows: int
    columns: int
    bits: int  # 2 to 8, or 16/32 for values stored as `dtype`
    group_size: int  # columns that share one scale; 0 if not quantised
    scale_bits: int  # 16, 8 if the scales are quantised themselves, 0 if there are none
    dtype: str  # of the stored values if not quantised
    bias_dtype: str
    weight_offset: int
    scale_offset: int  # -1 if not quantised
    step_offset: int  # -1 unless the scales are quantised
    bias_offset: int  # -1 if there is no bias

    @property
    def spec(self) -> MatrixSpec:
        """The spec that this layout was planned from."""
        dtypes = STORED_DTYPES[self.dtype], STORED_DTYPES[self.bias_dtype]
        return MatrixSpec(self.name, self.rows, self.columns, self.bias_offset >= 0, *dtypes)

    @property
    def stored_rows(self) -> int:
        return padded_rows(self.rows) if self.group_size else self.rows

    @property
    def groups(self) -> int:
        return self.columns // self.group_size

    @property
    def shared(self) -> int:
        """How many groups share a step, where the scales are quantised."""
        return shared_steps(self.groups)


@dataclass(frozen=True)
class RecordLayout:
    """Where everything lies in a record of `record_bytes` bytes."""

    matrices: tuple[MatrixLayout, ...]
    record_bytes: int

    @property
    def weights(self) -> int:
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordLayout:
        """The layout whose fields `data` holds.

        Raises `KeyError`, `TypeError` or `ValueError` on anything that `plan_layout` would not
        make, because kernels trust offsets and sizes, and would read or write outside the record.
        """
        matrices = tuple(MatrixLayout(**matrix) for matrix in data["matrices"])
        for matrix in matrices:
            sizes = (matrix.rows, matrix.columns, matrix.bits, matrix.scale_bits)
            if any(type(size) is not int for size in sizes) or min(sizes[:3]) < 1:
                raise ValueError(f"{matrix.name} has sizes {sizes}")
        specs = tuple(matrix.spec for matrix in matrices)
        schemes = {Scheme(16)} if matrices else set()
        schemes |= {
            Scheme(matrix.bits, group_size, matrix.scale_bits)
            for matrix in matrices
            if matrix.group_size
            for group_size in GROUP_SIZES
        }
        for planned in (plan_layout(specs, scheme) for scheme in schemes):
            if planned == cls(matrices, data["record_bytes"]):
                return planned
        raise ValueError("a layout that makes no sense")


@dataclass(frozen=True)
class MatrixSpec:
    """One matrix of an expert before it has a place; a layout is planned from such specs."""

    name: str
    rows: int
    columns: int
    has_bias: bool
    dtype: torch.dtype
    bias_dtype: torch.dtype | None = None  # None means the weight's dtype

    @property
    def shape(self) -> tuple[str, int, int, bool]:
        """Everything but the dtypes."""
        return self.name, self.rows, self.columns, self.has_bias


def fitting_group(columns: int, group_size: int) -> int:
    """The largest group that divides `columns`, found by halving `group_size`.

    Returns 0 if that group is smaller than `SMALLEST_GROUP`, because its scales would take more
    bytes than its codes save.
    """
    while columns % group_size:
        group_size //= 2
    return group_size if group_size >= SMALLEST_GROUP else 0


def plan_layout(specs: tuple[MatrixSpec, ...], scheme: Scheme) -> RecordLayout:
    """Lay out an expert's matrices one after the other, each part aligned.

    A matrix whose columns no group divides is stored unquantised.
    """
    end = 0

    def place(size: int) -> int:
        nonlocal end
        start = end
        end = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return start

    matrices = []
    for spec in specs:
        bias_dtype = spec.bias_dtype or spec.dtype
        group = fitting_group(spec.columns, scheme.group_size) if scheme.quantised else 0
        if group:
            bits, rows, scale_bits = scheme.bits, padded_rows(spec.rows), scheme.scale_bits
            groups = spec.columns // group
        else:
            bits, rows, scale_bits, groups = spec.dtype.itemsize * 8, spec.rows, 0, 0
        weight = place(rows * spec.columns * bits // 8)
        scale = place(groups * rows * 2 * scale_bits // 8) if group else -1
        step = -1
        if scale_bits == 8:
            step = place(groups // shared_steps(groups) * rows * STEP_VALUES * 2)
        bias = place(spec.rows * bias_dtype.itemsize) if spec.has_bias else -1
        sizes = spec.rows, spec.columns, bits, group, scale_bits
        dtype, stored_bias = (str(kind).removeprefix("torch.") for kind in (spec.dtype, bias_dtype))
        offsets = weight, scale, step, bias
        matrices.append(MatrixLayout(spec.name, *sizes, dtype, stored_bias, *offsets))
    return RecordLayout(tuple(matrices), end)


@dataclass(frozen=True)
class MatrixView:
    """One matrix inside a record's bytes, which are not copied."""

    layout: MatrixLayout
    weight: Tensor  # [stored_rows / 64, K * bits * 8] uint8, or [N, K] in the stored dtype
    scales: Tensor | None  # [K/g, stored_rows, 2] bfloat16, or uint8 if there are steps
    steps: Tensor | None  # [K/g/s, stored_rows, 4] bfloat16, see `quant.codes`
    bias: Tensor | None  # [N] in the stored dtype


def view_record(record: Tensor, layout: RecordLayout) -> dict[str, MatrixView]:
    """The matrices of `record` [record_bytes or more] uint8 by name; nothing is copied."""
    return {matrix.name: _view_matrix(record, matrix) for matrix in layout.matrices}


def _view_matrix(record: Tensor, matrix: MatrixLayout) -> MatrixView:
    def part(offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        return record.narrow(0, offset, size).view(dtype).view(shape)

    rows, columns = matrix.stored_rows, matrix.columns
    scales = steps = bias = None
    if matrix.group_size:
        tile = columns * matrix.bits * TILE_ROWS // 8
        weight = part(matrix.weight_offset, torch.uint8, rows // TILE_ROWS, tile)
        kind = torch.uint8 if matrix.scale_bits == 8 else torch.bfloat16
        scales = part(matrix.scale_offset, kind, matrix.groups, rows, 2)
        if matrix.scale_bits == 8:
            spans = matrix.groups // matrix.shared
            steps = part(matrix.step_offset, torch.bfloat16, spans, rows, STEP_VALUES)
    else:
        weight = part(matrix.weight_offset, STORED_DTYPES[matrix.dtype], rows, columns)
    if matrix.bias_offset >= 0:
        bias = part(matrix.bias_offset, STORED_DTYPES[matrix.bias_dtype], matrix.rows)
    return MatrixView(matrix, weight, scales, steps, bias)


def view_rows(view: MatrixView, start: int, end: int) -> MatrixView:
    """Rows `start` to `end` of a quantised matrix without its bias; nothing is copied.

    `start` is the first row of a tile. An `end` beyond the matrix means its last row.
    """
    assert view.scales is not None
    rows = slice(start, padded_rows(min(end, view.layout.rows)))
    return MatrixView(
        replace(view.layout, rows=min(end, view.layout.rows) - start),
        view.weight[start // TILE_ROWS : rows.stop // TILE_ROWS],
        view.scales[:, rows],
        None if view.steps is None else view.steps[:, rows],
        None,
    )
