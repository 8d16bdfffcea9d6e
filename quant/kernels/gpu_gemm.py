"""GPU kernels that multiply many tokens by matrices in records, in blocks of cells of one expert.

A thread block has a few tiles of 64 rows and one block of cells. If codes have one plane, those in
the same bits of their bytes become a separate operand with a separate sum, so nothing is shuffled.
If codes have two planes, they are gathered. A cell's sum does not depend on the other cells of its
block.

Letters: M cells of a block, S cells, N rows, K columns, I inner.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import tensor

from offload.quant.kernels.gpu_codes import INTERPRETED, load_inputs, scale_pairs, with_bias

# A row of `blocks` holds an expert slot, and where the block's cells begin and end in `order`.
BLOCK_FIELDS = tl.constexpr(3)


@triton.jit
def product(x: tensor, weight: tensor, DTYPE: tl.constexpr) -> Any:
    """The product [M, N] float32 of x [M, K] and weight [K, N]."""
    if INTERPRETED:
        out = tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    else:
        out = tl.dot(x, weight.to(DTYPE), input_precision="ieee")
    return out


@triton.jit
def block_codes(plane: tensor, k: tensor, row: tensor, live: tensor, WIDTH: tl.constexpr) -> Any:
    """The codes [K, N] of one plane for rows `row` of a tile."""
    BYTES: tl.constexpr = 8 * WIDTH
    at = plane + (k[:, None] * BYTES + (row % BYTES)[None, :])
    packed = tl.load(at, mask=live[None, :], other=0).to(tl.int32)
    return (packed >> ((row // BYTES) * WIDTH)[None, :]) & (2**WIDTH - 1)


@triton.jit
def quantised_gemm(
    x: tensor, out: tensor, slots: tensor, blocks: tensor, order: tensor,
    x_stride: tensor, cells_a_row: tensor, slot_bytes: tensor, weight_at: tensor, scale_at: tensor,
    step_at: tensor, bias_at: tensor, rows: tensor, stored_rows: tensor,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr,
    SHARED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr, WIDTHS: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr, CELLS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Fill out [S, N]; a tile is cut into PARTS operands."""
    block = blocks + tl.program_id(1) * BLOCK_FIELDS
    slot = tl.load(block)
    first = tl.load(block + 1)
    end = tl.load(block + 2)
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    at = first + tl.arange(0, CELLS)
    filled = at < end
    cell = tl.load(order + at, mask=filled, other=0)
    lines = x + (cell // cells_a_row).to(tl.int64)[:, None] * x_stride
    WIDE: tl.constexpr = 64 // PARTS  # rows of a tile in one operand
    n = tl.arange(0, WIDE * TILES)
    tile = tl.program_id(0) * TILES + n // WIDE
    base = n % WIDE
    live = tile * 64 < stored_rows
    weight = record + weight_at
    plane = weight + (tile.to(tl.int64) * (K * 8 * BITS))[None, :]
    accs = (tl.zeros([CELLS, WIDE * TILES], tl.float32),) * PARTS
    column = tl.arange(0, COLS)
    for start in range(0, K, COLS):
        k = start + column
        group = start // GROUP
        inputs = tl.load(lines + k[None, :], mask=filled[:, None], other=0.0)
        if len(WIDTHS) == 1:
            packed = tl.load(
                plane + (k[:, None] * WIDE + base[None, :]), mask=live[None, :], other=0
            ).to(tl.int32)
            codes = ()
            for p in tl.static_range(PARTS):
                codes += ((packed >> (p * BITS)) & (2**BITS - 1),)
        else:
            high = plane + K * 8 * WIDTHS[0]
            low_codes = block_codes(plane, k, base, live, WIDTHS[0])
            codes = (low_codes | (block_codes(high, k, base, live, WIDTHS[1]) << WIDTHS[0]),)
        pairs = ()
        for p in tl.static_range(PARTS):
            pair = scale_pairs(
                record, scale_at, step_at, group, tile * 64 + p * WIDE + base, stored_rows, live,
                SCALE_BITS, SHARED,
            )  # fmt: skip
            pairs += (pair,)
        weights = ()
        for p in tl.static_range(PARTS):
            centred = (codes[p] - 2 ** (BITS - 1)).to(tl.float32)
            weights += (centred * pairs[p][0][None, :] + pairs[p][1][None, :],)
        added = ()
        for p in tl.static_range(PARTS):
            added += (accs[p] + product(inputs, weights[p], DTYPE),)
        accs = added
    to = out + cell.to(tl.int64)[:, None] * rows
    for p in tl.static_range(PARTS):
        row = (tile * 64 + p * WIDE + base)[None, :]
        total = with_bias(accs[p], record, bias_at, row, row < rows, BIAS, DTYPE)
        tl.store(to + row, total.to(DTYPE), mask=filled[:, None] & (row < rows))


@triton.jit
def plain_gemm(
    x: tensor, out: tensor, slots: tensor, blocks: tensor, order: tensor,
    x_stride: tensor, cells_a_row: tensor, slot_bytes: tensor, weight_at: tensor,
    bias_at: tensor, rows: tensor,
    K: tl.constexpr, STORED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CELLS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Fill out [S, N] from unquantised matrices [N, K] of dtype STORED."""
    block = blocks + tl.program_id(1) * BLOCK_FIELDS
    slot = tl.load(block)
    first = tl.load(block + 1)
    end = tl.load(block + 2)
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    at = first + tl.arange(0, CELLS)
    filled = at < end
    cell = tl.load(order + at, mask=filled, other=0)
    lines = x + (cell // cells_a_row).to(tl.int64)[:, None] * x_stride
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight = (record + weight_at).to(tl.pointer_type(STORED)) + row.to(tl.int64)[None, :] * K
    column = tl.arange(0, COLS)
    acc = tl.zeros([CELLS, ROWS], tl.float32)
    for start in range(0, K, COLS):
        k = start + column
        inputs = tl.load(lines + k[None, :], mask=filled[:, None] & (k < K)[None, :], other=0.0)
        live = (row < rows)[None, :] & (k < K)[:, None]
        w = tl.load(weight + k[:, None], mask=live, other=0.0)
        acc += product(inputs, w, DTYPE)
    row = row[None, :]
    total = with_bias(acc, record, bias_at, row, row < rows, BIAS, DTYPE)
    to = out + cell.to(tl.int64)[:, None] * rows
    tl.store(to + row, total.to(DTYPE), mask=filled[:, None] & (row < rows))


@triton.jit
def gate_rows(
    x: tensor, out: tensor, order: tensor, limit: tensor, alpha: tensor,
    INNER: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    CLAMPED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Fill out [S, I] with the activation of x [S, 2I] or [S, I] for the cells in `order`."""
    # Cells are the grid's first dimension because the second one is too short for all of them.
    cell = tl.load(order + tl.program_id(0)).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = k < INNER
    x += cell * (2 * INNER if GATED else INNER)
    inner = load_inputs(
        x, k, live, limit, alpha, INNER, GATE, GATED, INTERLEAVED, CLAMPED, DTYPE
    )  # fmt: skip
    tl.store(out + cell * INNER + k, inner.to(DTYPE), mask=live)
