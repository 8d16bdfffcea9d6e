"""Multiplies by packed weights, and dequantises them, on the CPU.

Letters: M tokens, N outputs (rows of the matrix), K inputs (its columns).
"""

from __future__ import annotations

import functools
import itertools
from array import array
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload.quant.codes import STEP_VALUES, TILE_ROWS
from offload.quant.program import Program
from offload.quant.record import MatrixView

if TYPE_CHECKING:
    from offload.quant.kernels.compiler import KernelCall

MOST_TOKENS = 4  # in a block; the sums of more would not fit into the registers
NORM_COLUMNS = 16  # the columns of a norm are a multiple of them
COLUMNS = 32  # the columns of a dense matrix are a multiple of them
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


@functools.cache
def rows_code(dtype: torch.dtype, tokens: int, bias: bool) -> KernelCall:
    from offload.quant.kernels.compiler import compiled_rows, this_processor
    from offload.quant.kernels.rows import RowsKernel

    processor, name = this_processor(), str(dtype).removeprefix("torch.")
    dots = dtype == torch.bfloat16 and processor.dots
    return compiled_rows(RowsKernel(name, tokens, bias, dots), processor)


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., K], few tokens, times the transposed dense `weight` [N, K], plus `bias` [N].

    All are bfloat16 or float16, and K is a multiple of `COLUMNS`.
    """
    x = x.contiguous()
    rows, columns = weight.shape
    tokens = x.numel() // columns
    out = x.new_empty(*x.shape[:-1], rows)
    few = rows * x.numel() < ALONE
    rows_code(x.dtype, tokens, bias is not None)(
        (
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            1 if few else torch.get_num_threads(),
        )
    )
    return out


def knows_layer(program: Program, dtype: torch.dtype) -> bool:
    """Whether there is a kernel that computes the experts of `program`."""
    up, down = program.up, program.down
    biased = [matrix for matrix in (up, down) if matrix.bias_offset >= 0]
    return (
        program.gate is not None
        and dtype in (torch.bfloat16, torch.float32)
        and up.group_size > 0
        and down.group_size > 0
        and down.rows == down.stored_rows
        and all(matrix.rows == matrix.stored_rows for matrix in biased)
        and all(matrix.bias_dtype in ("bfloat16", "float32") for matrix in biased)
    )


@functools.cache
def layer_code(program: Program, dtype: torch.dtype) -> KernelCall:
    """The kernel that computes the experts of a layer that `knows_layer` knows."""
    from offload.quant.kernels.compiler import compiled_layer, this_processor
    from offload.quant.kernels.layer import LayerKernel

    processor = this_processor()
    return compiled_layer(LayerKernel(program, dtype == torch.bfloat16, processor.dots), processor)


class LayerRoutine:
    """Computes experts of few tokens; each thread's scratch memory is kept."""

    def __init__(self, run: KernelCall, program: Program) -> None:
        """`run` is `layer_code` of `program`."""
        self._run, self._program = run, program
        # (thread, cells, tokens, bytes of a number) -> scratch memory, addresses of its parts
        self._scratch: dict[tuple[int, int, int, int], tuple[Tensor, list[int]]] = {}

    def __call__(self, hidden: Tensor, records: list[int], cells: list[int], out: Tensor) -> None:
        """Fill cells of `out` [S, H] with what experts make of few tokens `hidden` [T, H].

        Cell `cells[n]` is computed from the record that begins at the address `records[n]`.
        """
        assert out.is_contiguous(), "cells must be contiguous"
        hidden, tokens = hidden.contiguous(), hidden.shape[0]
        addresses, numbers = array("q", records), array("q", cells)
        self._run(
            (
                hidden.data_ptr(),
                addresses.buffer_info()[0],
                numbers.buffer_info()[0],
                out.data_ptr(),
                0,
                0,
                *self._parts(len(cells), tokens, hidden.element_size()),
                len(cells),
                tokens,
                out.shape[0] // tokens,
                torch.get_num_threads(),
            )
        )

    def reduced(self, cells: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum [T, H] over each token's `cells` [S, H]; `weights` are [T, k]."""
        tokens, k = weights.shape
        weights = weights.to(torch.float32).contiguous()
        total = cells.new_empty(tokens, cells.shape[1])
        places = (0, 0, 0, cells.data_ptr(), weights.data_ptr(), total.data_ptr())
        self._run((*places, 0, 0, 0, 0, 0, 0, 0, tokens, k, 1))
        return total

    def _parts(self, count: int, tokens: int, size: int) -> list[int]:
        """The addresses of the kernel's scratch words."""
        key = get_ident(), count, tokens, size
        if key not in self._scratch:
            up, down = self._program.up, self._program.down
            sizes = (
                4 * tokens * up.groups,
                4 * tokens * up.columns,
                size * count * up.stored_rows,
                size * count * down.columns,
                4 * count * down.groups,
                4 * count * down.columns,
            )
            memory = torch.empty(sum(sizes), dtype=torch.uint8)
            places = list(itertools.accumulate(sizes[:-1], initial=memory.data_ptr()))
            self._scratch[key] = memory, places
        return self._scratch[key][1]


def rms_norm(x: Tensor, weight: Tensor, epsilon: int) -> Tensor:
    """RMSNorm of `x` [..., D] with `weight` [D], bfloat16; `epsilon` has the bits of a float32."""
    from offload.quant.kernels.compiler import compiled_norm, this_processor

    x, columns = x.contiguous(), weight.shape[0]
    out = torch.empty_like(x)
    places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    compiled_norm(this_processor())((*places, x.numel() // columns, columns, epsilon, 1))
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
