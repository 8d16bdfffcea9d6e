"""GPU kernels that multiply single tokens by matrices in records.

A thread block has a tile of 64 rows. Its threads walk *spans* of columns that share a scale. Eight
threads read 128 neighbouring bytes, which are four columns of a 4-bit tile; the other threads of
the warps do the same in other spans. Scales are therefore applied once a span, and threads exchange
nothing until the end. Each plane of codes is summed by itself. Sums are float32, in an order that
depends only on the shape.

Letters: S cells (a cell is one token and one matrix), N rows, K columns.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import tensor

from offload.quant.kernels.gpu_codes import (
    MAGIC,
    centred,
    code_weight,
    load_inputs,
    scale_pairs,
    with_bias,
)


@triton.jit
def plane_sums(
    x: tensor, record: tensor, plane: tensor, tile: tensor, first: tensor, magic: tensor,
    scale_at: tensor, step_at: tensor, stored_rows: tensor, limit: tensor, alpha: tensor,
    K: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr,
    CENTRE: tl.constexpr, SCALE_BITS: tl.constexpr, SHARED: tl.constexpr,
    GATE: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr,
    DTYPE: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr, STEPS: tl.constexpr,
) -> Any:  # fmt: skip
    """Multiply one plane of a tile by the inputs.

    A column of the plane has 2 * WIDTH words. Returns one tensor [2 * WIDTH] for each code of a
    word, with the sums of the rows whose codes lie there.
    """
    WORDS: tl.constexpr = 2 * WIDTH
    SPANS: tl.constexpr = K // SPAN
    CODES: tl.constexpr = 32 // WIDTH  # codes in a word
    span_lane = tl.arange(0, LANES)
    column = tl.arange(0, COLUMNS)
    word = tl.arange(0, WORDS)
    zero = tl.zeros([LANES, COLUMNS, WORDS], tl.float32)
    outs = (zero,) * CODES
    for start in range(first * LANES, SPANS, SPLIT * LANES):
        span = start + span_lane
        live = span < SPANS
        here = live[:, None, None]
        group = ((span * SPAN) // GROUP)[:, None, None]
        row = tile * 64 + word[None, None, :] * 4
        pairs = ()
        for c in tl.static_range(CODES):
            pair = scale_pairs(
                record, scale_at, step_at, group,
                row + (c * WIDTH // 8 + (c * WIDTH % 8) // WIDTH * (8 * WIDTH)),
                stored_rows, here, SCALE_BITS, SHARED,
            )  # fmt: skip
            pairs += (pair,)
        sums = tl.zeros([LANES, COLUMNS, 1], tl.float32)
        accs = (zero,) * CODES
        begin = span[:, None] * SPAN + column[None, :]
        column_words = plane + (begin[:, :, None] * WORDS + word[None, None, :])
        for step in range(0, SPAN, COLUMNS * STEPS):
            # All weights are requested first, so that loading inputs and summing hide the latency.
            words = ()
            for u in tl.static_range(STEPS):
                at = column_words + (step + u * COLUMNS) * WORDS
                words += (tl.load(at, mask=here, other=0),)
            inputs = ()
            for u in tl.static_range(STEPS):
                part = load_inputs(
                    x, begin + step + u * COLUMNS, live[:, None], limit, alpha,
                    K, GATE, GATED, INTERLEAVED, CLAMPED, DTYPE,
                )  # fmt: skip
                inputs += (part[:, :, None],)
            for u in tl.static_range(STEPS):
                sums += inputs[u]
                added = ()
                for c in tl.static_range(CODES):
                    code = centred(words[u], magic, CENTRE, c * WIDTH, WIDTH)
                    added += (accs[c] + code * inputs[u],)
                accs = added
        if LOW == 0:
            shifted = ()
            for c in tl.static_range(CODES):
                shifted += (outs[c] + sums * pairs[c][1],)
            outs = shifted
        scaled = ()
        for c in tl.static_range(CODES):
            scale = pairs[c][0] * (2.0**LOW * code_weight(c * WIDTH, WIDTH))
            scaled += (outs[c] + accs[c] * scale,)
        outs = scaled
    totals = ()
    for c in tl.static_range(CODES):
        totals += (tl.sum(tl.sum(outs[c], 0), 0),)
    return totals


@triton.jit
def store_sums(
    totals: tl.tuple, place: tensor, tile: tensor, rows: tensor, record: tensor, bias_at: tensor,
    WIDTH: tl.constexpr, FINAL: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
) -> None:  # fmt: skip
    """Store the sums from `plane_sums`, as results if FINAL, else as summands for `add_parts`."""
    word = tl.arange(0, 2 * WIDTH)
    for c in tl.static_range(32 // WIDTH):
        row = tile * 64 + word * 4 + (c * WIDTH // 8 + (c * WIDTH % 8) // WIDTH * (8 * WIDTH))
        total = totals[c]
        if FINAL:
            total = with_bias(total, record, bias_at, row, row < rows, BIAS, DTYPE)
        tl.store(place + row, total.to(place.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize_on_alignment=["slot_of_cell"])
def quantised_gemv(
    x: tensor, out: tensor, slots: tensor, slot_of_cell: tensor,
    x_stride: tensor, cells_a_row: tensor, slot_bytes: tensor, weight_at: tensor, scale_at: tensor,
    step_at: tensor, bias_at: tensor, rows: tensor, stored_rows: tensor, limit: tensor,
    alpha: tensor,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr,
    SHARED: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, DTYPE: tl.constexpr, SPAN: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    WIDTHS: tl.constexpr,
) -> None:  # fmt: skip
    """Fill out [S, N], or its summands [SPLIT * planes, S, N] float32 if there are several."""
    tile = tl.program_id(0)
    cell = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(slot_of_cell + cell)
    if slot < 0:
        return
    # `slot >> 30` is 0, but the compiler cannot know that. It therefore keeps MAGIC in a register,
    # and masking and OR-ing become one instruction.
    magic = ((slot >> 30) | MAGIC).to(tl.uint32)
    record = slots + slot.to(tl.int64) * slot_bytes
    row_x = x + (cell // cells_a_row).to(tl.int64) * x_stride
    words = (record + weight_at).to(tl.pointer_type(tl.uint32)) + tile.to(tl.int64) * (K * 2 * BITS)
    WIDTH: tl.constexpr = WIDTHS[0]
    place = out + (part * tl.num_programs(1) + cell).to(tl.int64) * rows
    if part < SPLIT:
        totals = plane_sums(
            row_x, record, words, tile, part, magic, scale_at, step_at, stored_rows, limit, alpha,
            K, GROUP, 0, WIDTH, 2 ** (BITS - 1), SCALE_BITS, SHARED, GATE, GATED,
            INTERLEAVED, CLAMPED, DTYPE, SPAN, COLUMNS, LANES, SPLIT, STEPS,
        )  # fmt: skip
        FINAL: tl.constexpr = len(WIDTHS) * SPLIT == 1
        store_sums(totals, place, tile, rows, record, bias_at, WIDTH, FINAL, BIAS, DTYPE)
    elif len(WIDTHS) == 2:
        HIGH: tl.constexpr = WIDTHS[1]
        high = plane_sums(
            row_x, record, words + K * 2 * WIDTH, tile, part - SPLIT, magic,
            scale_at, step_at, stored_rows, limit, alpha,
            K, GROUP, WIDTH, HIGH, 0, SCALE_BITS, SHARED, GATE, GATED,
            INTERLEAVED, CLAMPED, DTYPE, SPAN, COLUMNS, LANES, SPLIT, STEPS,
        )  # fmt: skip
        store_sums(high, place, tile, rows, record, bias_at, HIGH, False, BIAS, DTYPE)


@triton.jit(do_not_specialize_on_alignment=["slot_of_cell"])
def add_parts(
    parts: tensor, out: tensor, slots: tensor, slot_of_cell: tensor, slot_bytes: tensor,
    bias_at: tensor, rows: tensor,
    PARTS: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Fill out [S, N] with the sum of parts [PARTS, S, N] float32, added in their order."""
    cell = tl.program_id(1)
    slot = tl.load(slot_of_cell + cell)
    if slot < 0:
        return
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        place = parts + (part * tl.num_programs(1) + cell).to(tl.int64) * rows
        total += tl.load(place + row, mask=live, other=0.0)
    record = slots + slot.to(tl.int64) * slot_bytes
    total = with_bias(total, record, bias_at, row, live, BIAS, DTYPE)
    tl.store(out + cell.to(tl.int64) * rows + row, total.to(DTYPE), mask=live)


@triton.jit(do_not_specialize_on_alignment=["slot_of_cell"])
def plain_gemv(
    x: tensor, out: tensor, slots: tensor, slot_of_cell: tensor,
    x_stride: tensor, cells_a_row: tensor, slot_bytes: tensor, weight_at: tensor,
    bias_at: tensor, rows: tensor, limit: tensor, alpha: tensor,
    K: tl.constexpr, STORED: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Fill out [S, N] from unquantised matrices [N, K] of dtype STORED."""
    cell = tl.program_id(1)
    slot = tl.load(slot_of_cell + cell)
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    row_x = x + (cell // cells_a_row).to(tl.int64) * x_stride
    weight = (record + weight_at).to(tl.pointer_type(STORED))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLS)
    lines = weight + row.to(tl.int64)[:, None] * K
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, COLS):
        k = start + column
        v = load_inputs(
            row_x, k, k < K, limit, alpha, K, GATE, GATED, INTERLEAVED, CLAMPED, DTYPE
        )  # fmt: skip
        live = (row < rows)[:, None] & (k < K)[None, :]
        w = tl.load(lines + k[None, :], mask=live, other=0.0).to(tl.float32)
        acc += w * v[None, :]
    total = with_bias(tl.sum(acc, 1), record, bias_at, row, row < rows, BIAS, DTYPE)
    tl.store(out + cell.to(tl.int64) * rows + row, total.to(DTYPE), mask=row < rows)
