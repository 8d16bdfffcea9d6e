"""Multiplying by a matrix that lies in a record.

Knows: the reference (dequantise, then `linear`) on any device, the fast CPU path, and how to find
out at start whether this machine has it. Does not know: experts, layers, slots. The only module of
`quant` that reaches kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.packing import TILE_ROWS, pack, unpack, unpack_rows
from quant.record import MatrixLayout, MatrixView
from quant.scales import decode_scales

Matmul = Callable[[Tensor, MatrixView], Tensor]

# M tokens, K inputs, N outputs, g group size


def dequantize(view: MatrixView, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that `view` stands for, in `dtype`."""
    if view.scales is None:
        return view.weight.to(dtype)
    layout = view.layout
    rows, groups = layout.stored_rows, layout.groups
    codes = unpack(view.weight, layout.bits).view(rows, groups, layout.group_size)  # [N, K/g, g]
    pairs = view.scales.float() if view.steps is None else decode_scales(view.scales, view.steps)
    scale, offset = pairs.permute(2, 1, 0).unsqueeze(-1)  # [N, K/g, 1] each
    centred = codes.to(torch.float32).sub_(2 ** (layout.bits - 1))
    weight = centred.mul_(scale).add_(offset).to(dtype)
    return weight.view(rows, layout.columns)[: layout.rows]


def take_rows(view: MatrixView, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [T, K] of the quantised matrix, numbered by `rows` [T], in `dtype`."""
    assert view.scales is not None
    layout = view.layout
    codes = unpack_rows(view.weight, layout.bits, rows).float()  # [T, K]
    scales = view.scales[:, rows]  # [K/g, T, 2]
    pairs = scales.float() if view.steps is None else decode_scales(scales, view.steps[:, rows])
    scale, offset = pairs.transpose(0, 1).unsqueeze(2).unbind(-1)  # [T, K/g, 1] each
    centred = codes.view(len(rows), -1, layout.group_size) - 2 ** (layout.bits - 1)
    return torch.addcmul(offset, centred, scale).reshape(len(rows), -1).to(dtype)


def matmul_reference(x: Tensor, view: MatrixView) -> Tensor:
    """`x` [M, K] times the transposed matrix, plus its bias: [M, N] in x's dtype, on any device."""
    bias = None if view.bias is None else view.bias.to(x.dtype)
    return linear(x, dequantize(view, x.dtype), bias)


def matmul_cpu_int4(x: Tensor, view: MatrixView) -> Tensor:
    """As `matmul_reference` for 4 bits and bfloat16 `x`, without unpacking the matrix first."""
    layout = view.layout
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, view.weight.view(layout.stored_rows, -1), layout.group_size, view.scales
    )
    if layout.rows != layout.stored_rows:
        out = out[:, : layout.rows]
    return out if view.bias is None else out + view.bias.to(x.dtype)


# Above this many tokens unpacking once and multiplying densely wins: measured in docs/log.md.
INT4_MAX_TOKENS = 64


def matmul(x: Tensor, view: MatrixView) -> Tensor:
    """`x` [M, K] times the matrix in `view`: [M, N], by the fastest way this machine has."""
    layout = view.layout
    if (
        layout.bits == 4
        and layout.scale_bits == 16
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] <= INT4_MAX_TOKENS
        and layout.group_size in (32, 64, 128, 256)
        and cpu_int4_works()
    ):
        return matmul_cpu_int4(x, view)
    return matmul_reference(x, view)


@functools.cache
def cpu_int4_works() -> bool:
    """Whether torch's int4 kernel reads our tiles on this CPU (it does with AVX-512).

    Other instruction sets use another order of bytes, so a small product is compared with the
    reference.
    """
    view = _probe_view()
    x = torch.randn(2, view.layout.columns, generator=torch.Generator().manual_seed(1))
    x = x.to(torch.bfloat16)
    try:
        fast = matmul_cpu_int4(x, view)
    except (RuntimeError, AttributeError):  # not built for this CPU, or gone from this torch
        return False
    return torch.allclose(fast.float(), matmul_reference(x, view).float(), rtol=0.05, atol=0.05)


def _probe_view() -> MatrixView:
    rows, columns, group = 2 * TILE_ROWS, 128, 64
    layout = MatrixLayout(
        "probe", rows, columns, 4, group, 16, "bfloat16", "bfloat16", 0, 0, -1, -1
    )
    random = torch.Generator().manual_seed(0)  # equal rows would hide a wrong order of them
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    scales = torch.full((columns // group, rows, 2), 0.01, dtype=torch.bfloat16)
    return MatrixView(layout, pack(codes, 4), scales, None, None)
