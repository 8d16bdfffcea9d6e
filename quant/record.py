"""The expert record: one expert as one contiguous, aligned run of bytes.

A `RecordLayout` says where an expert's codes, scales and biases lie; a model's name plays no part.
Every matrix is stored as [out, in], whatever the checkpoint's orientation. Scales are pairs
`(scale, offset)` of shape [K/g, N, 2], as bfloat16 or as bytes that count steps (`quant.codes`).

Letters: N rows, K columns, g columns of a group, s groups that share a step, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from offload.quant.codes import STEP_VALUES, TILE_ROWS, padded_rows, shared_steps
from offload.quant.scheme import GROUP_SIZES, SMALLEST_GROUP, Scheme
from torch import Tensor

ALIGNMENT = 256  # bytes; more than any vector load or copy engine asks for
STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        return MatrixSpec(
            self.name,
            self.rows,
            self.columns,
            self.bias_offset >= 0,
            STORED_DTYPES[self.dtype],
            STORED_DTYPES[self.bias_dtype],
        )

    @property
    def stored_rows(self) -> int:
        return padded_rows(self.rows) if self.group_size else self.rows

    @property
    def groups(self) -> int:
        return self.columns // self.group_size

    @property
    def weight_bytes(self) -> int:
        return self.stored_rows * self.columns * self.bits // 8


@dataclass(frozen=True)
class RecordLayout:
    """Where everything lies in a record of `record_bytes` bytes."""

    matrices: tuple[MatrixLayout, ...]
    record_bytes: int

    @property
    def weights(self) -> int:
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordLayout:
        """Read what `to_json` wrote.

        Raises `KeyError`, `TypeError` or `ValueError` on anything that `plan_layout` would not
        make, because kernels trust offsets and sizes, and would read or write outside the record.
        """
        matrices = tuple(MatrixLayout(**matrix) for matrix in data["matrices"])
        given = cls(matrices, data["record_bytes"])
        for planned in _plans(matrices):
            if planned == given:
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
            bits, rows = scheme.bits, padded_rows(spec.rows)
            pairs = rows * spec.columns // group * 2
        else:
            bits, rows, pairs = spec.dtype.itemsize * 8, spec.rows, 0
        scale_bits = scheme.scale_bits if pairs else 0
        weight = place(rows * spec.columns * bits // 8)
        scale = place(pairs * scale_bits // 8) if pairs else -1
        step = -1
        if scale_bits == 8:
            shared = shared_steps(spec.columns // group)
            step = place(spec.columns // group // shared * rows * STEP_VALUES * 2)
        bias = place(spec.rows * bias_dtype.itemsize) if spec.has_bias else -1
        matrices.append(
            MatrixLayout(
                spec.name,
                spec.rows,
                spec.columns,
                bits,
                group,
                scale_bits,
                _dtype_name(spec.dtype),
                _dtype_name(bias_dtype),
                weight,
                scale,
                step,
                bias,
            )
        )
    return RecordLayout(tuple(matrices), end)


def _plans(matrices: tuple[MatrixLayout, ...]) -> Iterator[RecordLayout]:
    """Yield every layout that could be planned for matrices of these sizes and bits."""
    for matrix in matrices:
        sizes = (matrix.rows, matrix.columns, matrix.bits, matrix.scale_bits)
        if any(type(size) is not int for size in sizes) or min(sizes[:3]) < 1:
            raise ValueError(f"{matrix.name} has sizes {sizes}")
    specs = tuple(matrix.spec for matrix in matrices)
    first = next((matrix for matrix in matrices if matrix.group_size), None)
    if first is not None:
        for group_size in GROUP_SIZES:
            yield plan_layout(specs, Scheme(first.bits, group_size, first.scale_bits))
    elif matrices:
        yield plan_layout(specs, Scheme(16))


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
    weight = record.narrow(0, matrix.weight_offset, matrix.weight_bytes)
    scales = steps = bias = None
    rows = matrix.stored_rows
    if matrix.group_size:
        weight = weight.view(rows // TILE_ROWS, -1)
        size = matrix.groups * rows * 2 * matrix.scale_bits // 8
        scales = record.narrow(0, matrix.scale_offset, size)
        if matrix.scale_bits == 8:
            spans = matrix.groups // shared_steps(matrix.groups)
            size = spans * rows * STEP_VALUES * 2
            steps = record.narrow(0, matrix.step_offset, size).view(torch.bfloat16)
            steps = steps.view(spans, rows, STEP_VALUES)
        else:
            scales = scales.view(torch.bfloat16)
        scales = scales.view(matrix.groups, rows, 2)
    else:
        weight = weight.view(STORED_DTYPES[matrix.dtype]).view(matrix.rows, matrix.columns)
    if matrix.bias_offset >= 0:
        bias_dtype = STORED_DTYPES[matrix.bias_dtype]
        size = matrix.rows * bias_dtype.itemsize
        bias = record.narrow(0, matrix.bias_offset, size).view(bias_dtype)
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
