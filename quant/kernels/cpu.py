"""Multiplies by packed weights, and dequantises them, on the CPU.

Letters: M tokens, N outputs (rows of the matrix), K inputs (its columns).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload.quant.codes import STEP_VALUES, TILE_ROWS
from offload.quant.record import MatrixView

if TYPE_CHECKING:
    from offload.quant.kernels.compiler import KernelCall

MOST_TOKENS = 4  # in a block; the sums of more would not fit into the registers
ALONE = 2**16  # weights times tokens; with less work, waking other threads costs more than it saves

# One product of the demo model takes 30 us, so the code around each call avoids every extra step.


@functools.cache
def code_for(bits: int, scale_bits: int, dtype: torch.dtype, block: int) -> KernelCall:
    from offload.quant.kernels.compiler import compiled, this_processor
    from offload.quant.kernels.reader import Kernel

    assert dtype in (torch.bfloat16, torch.float32)
    processor, bfloat16 = this_processor(), dtype == torch.bfloat16
    dots = bfloat16 and block > 0 and bits < 8 and processor.dots
    return compiled(Kernel(bits, scale_bits, bfloat16, block, dots), processor)


def multiply(x: Tensor, view: MatrixView) -> Tensor:
    """`x` [M, K] bfloat16 or float32 times the transposed matrix, without its bias: [M, N]."""
    layout = view.layout
    x = x.contiguous()
    count, columns = x.shape
    assert columns == layout.columns, f"{columns} inputs for {layout.columns} columns"
    blocks = -(-count // MOST_TOKENS)
    block = -(-count // blocks)
    rows, padded = layout.stored_rows, blocks * block
    out = x.new_empty(padded, rows)
    # This buffer holds the floats and, behind them, the sums of groups. The dtype is given because
    # a user may change torch's default.
    floats = torch.empty(count, columns + layout.groups, dtype=torch.float32)
    place = floats.data_ptr()
    sums = place + 4 * count * columns
    words = _words(view, out, 0, rows, count, (x.data_ptr(), place, sums, count, blocks))
    code_for(layout.bits, layout.scale_bits, x.dtype, block)(words)
    if padded != count or rows != layout.rows:
        return out[:count, : layout.rows].contiguous()
    return out


def dequantize_rows(view: MatrixView, dtype: torch.dtype, start: int, end: int) -> Tensor:
    """The transposed weights [K, end - start] of rows `start` to `end`, which are whole tiles."""
    layout = view.layout
    out = torch.empty(layout.columns, end - start, dtype=dtype)
    code_for(layout.bits, layout.scale_bits, dtype, 0)(_words(view, out, start, end))
    return out


def _words(
    view: MatrixView,
    out: Tensor,
    start: int,
    end: int,
    passes: int = 1,
    tokens: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
) -> tuple[int, ...]:
    """The arguments of a kernel, in the order of `quant.kernels.reader.WORDS`."""
    assert view.scales is not None
    assert view.scales.is_contiguous(), "kernels cannot read a part of a matrix"
    layout = view.layout
    groups, columns, shared = layout.groups, layout.columns, layout.groups
    steps = 0
    if view.steps is not None:
        steps = view.steps.data_ptr() + start * STEP_VALUES * view.steps.itemsize
        shared = groups // view.steps.shape[0]
    return (
        *tokens,
        view.weight.data_ptr() + start * columns * layout.bits // 8,
        view.scales.data_ptr() + start * 2 * view.scales.itemsize,
        steps,
        out.data_ptr(),
        (end - start) // TILE_ROWS,
        layout.stored_rows,
        groups,
        layout.group_size,
        shared,
        1 if (end - start) * columns * passes < ALONE else torch.get_num_threads(),
    )
