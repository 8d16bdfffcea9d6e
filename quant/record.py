"""The expert record: one expert as one contiguous, aligned run of bytes.

Knows: which matrices an expert has, where their codes, scales and biases lie, and how to write and
view them. All of it is data (`RecordLayout`), nothing follows from a model's name. Does not know:
which file or slot a record is in.

Every matrix is stored as [out, in] whatever the checkpoint's orientation. Scales are bfloat16 pairs
`(scale, offset)` of shape [K/g, N, 2].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quant.hqq import quantize
from quant.packing import pack, padded_rows

ALIGNMENT = 256  # bytes; more than any vector load or copy engine asks for
STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class MatrixLayout:
    """One matrix [rows, columns] = [out, in] of an expert. Offsets are bytes from the record's
    start."""

    name: str
    rows: int
    columns: int
    bits: int  # 4 or 8, or 16/32 for values stored as `dtype`
    group_size: int  # columns that share one scale; 0 when unquantised
    dtype: str  # of the stored values when unquantised
    bias_dtype: str
    weight_offset: int
    scale_offset: int  # -1 when unquantised
    bias_offset: int  # -1 when there is none

    @property
    def stored_rows(self) -> int:
        return padded_rows(self.rows, self.bits)

    @property
    def weight_bytes(self) -> int:
        return self.stored_rows * self.columns * self.bits // 8


@dataclass(frozen=True)
class RecordLayout:
    """Where everything lies in a record of `record_bytes` bytes."""

    matrices: tuple[MatrixLayout, ...]
    record_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordLayout:
        matrices = tuple(MatrixLayout(**matrix) for matrix in data["matrices"])
        return cls(matrices, int(data["record_bytes"]))


@dataclass(frozen=True)
class MatrixSpec:
    """What a layout is planned from: one matrix of an expert before it has a place."""

    name: str
    rows: int
    columns: int
    has_bias: bool
    dtype: torch.dtype
    bias_dtype: torch.dtype | None = None  # None: as the weight


def fitting_group(columns: int, group_size: int) -> int:
    """The largest group not above `group_size` that divides `columns`, halving from
    `group_size`."""
    while group_size > 1 and columns % group_size:
        group_size //= 2
    return group_size


def plan_layout(specs: tuple[MatrixSpec, ...], bits: int, group_size: int) -> RecordLayout:
    """Lay out an expert's matrices one after the other, each part aligned."""
    end = 0

    def place(size: int) -> int:
        nonlocal end
        start = end
        end = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return start

    matrices = []
    for spec in specs:
        quantised = bits < 16
        stored_bits = bits if quantised else spec.dtype.itemsize * 8
        stored_rows = padded_rows(spec.rows, stored_bits)
        group = fitting_group(spec.columns, group_size) if quantised else 0
        weight = place(stored_rows * spec.columns * stored_bits // 8)
        scale = place(stored_rows * spec.columns // group * 4) if quantised else -1
        bias_dtype = spec.bias_dtype or spec.dtype
        bias = place(spec.rows * bias_dtype.itemsize) if spec.has_bias else -1
        matrices.append(
            MatrixLayout(
                spec.name,
                spec.rows,
                spec.columns,
                stored_bits,
                group,
                _dtype_name(spec.dtype),
                _dtype_name(bias_dtype),
                weight,
                scale,
                bias,
            )
        )
    return RecordLayout(tuple(matrices), end)


@dataclass(frozen=True)
class MatrixView:
    """One matrix inside a record's bytes; nothing is copied."""

    layout: MatrixLayout
    weight: Tensor  # [stored_rows, K * bits / 8] uint8, or [N, K] in the stored dtype
    scales: Tensor | None  # [K/g, stored_rows, 2] bfloat16
    bias: Tensor | None  # [N] in the stored dtype


def view_record(record: Tensor, layout: RecordLayout) -> dict[str, MatrixView]:
    """View `record` [record_bytes or more] uint8 as its matrices, by name."""
    return {matrix.name: _view_matrix(record, matrix) for matrix in layout.matrices}


def _view_matrix(record: Tensor, matrix: MatrixLayout) -> MatrixView:
    dtype = STORED_DTYPES[matrix.dtype]
    weight = record.narrow(0, matrix.weight_offset, matrix.weight_bytes)
    scales = bias = None
    if matrix.group_size:
        groups = matrix.columns // matrix.group_size
        weight = weight.view(matrix.stored_rows, -1)
        scales = (
            record.narrow(0, matrix.scale_offset, groups * matrix.stored_rows * 4)
            .view(torch.bfloat16)
            .view(groups, matrix.stored_rows, 2)
        )
    else:
        weight = weight.view(dtype).view(matrix.rows, matrix.columns)
    if matrix.bias_offset >= 0:
        bias_dtype = STORED_DTYPES[matrix.bias_dtype]
        size = matrix.rows * bias_dtype.itemsize
        bias = record.narrow(0, matrix.bias_offset, size).view(bias_dtype)
    return MatrixView(matrix, weight, scales, bias)


def encode_record(
    out: Tensor, layout: RecordLayout, matrices: Mapping[str, tuple[Tensor, Tensor | None]]
) -> None:
    """Write one expert into `out` [record_bytes] uint8.

    `matrices` maps each name in `layout` to `(weight [N, K], bias [N] or None)`.
    """
    out.zero_()  # padding included: equal experts are equal bytes
    for name, view in view_record(out, layout).items():
        weight, bias = matrices[name]
        if view.scales is None:
            view.weight.copy_(weight)
        else:
            solved = quantize(weight, view.layout.bits, view.layout.group_size)
            rows = view.layout.rows
            codes = torch.zeros(view.layout.stored_rows, view.layout.columns, dtype=torch.uint8)
            codes[:rows] = solved.codes
            view.weight.copy_(pack(codes, view.layout.bits))
            view.scales[:, :rows, 0] = solved.scale.t()
            view.scales[:, :rows, 1] = solved.offset.t()
        if view.bias is not None:
            assert bias is not None, f"layout has a bias for {name}, the checkpoint has none"
            view.bias.copy_(bias)
