"""Launches the GPU's kernels: products with matrices in records, and activations.

Launch parameters depend only on a matrix's shape and on how many matrices each token is multiplied
by, so that nothing else affects how results are rounded.

Letters: S cells (a cell is one token at one of its experts), T tokens, k cells of a token, N rows,
K columns, I inner, B blocks of cells.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.quant.codes import PLANES, TILE_ROWS
from offload.quant.kernels.gpu_codes import INTERPRETED
from offload.quant.kernels.gpu_gemm import gate_rows, plain_gemm, quantised_gemm
from offload.quant.kernels.gpu_gemv import add_parts, plain_gemv, quantised_gemv
from offload.quant.program import Gate
from offload.quant.record import STORED_DTYPES, MatrixLayout

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

WARPS = 4
# How many 32-bit words a thread loads at once, by the width of a plane. Four words (16 bytes) are
# the widest load; for planes of 2 bits they would need as many sums as a thread has registers.
WORDS_A_THREAD = {8: 4, 4: 4, 2: 2}
# How many columns of a span threads read at a time; 4 columns are 128 bytes of a 4-bit tile. The
# interpreter's time depends on operations, not on elements, so more columns make tests faster.
COLUMNS = 16 if INTERPRETED.value else 4
LONGEST_SPAN = 64  # columns between two scalings
# How many loads a thread begins before it uses the first, by the width of a plane.
MOST_STEPS = {8: 4, 4: 8, 2: 8}
MOST_STEPS_FLOAT32 = {8: 4, 4: 4, 2: 2}
MOST_REGISTERS = 255  # of one thread
FEW_BLOCKS = 96  # fewer thread blocks than this leave many processors of a large GPU idle
ENOUGH_BLOCKS = 384  # this many keep its memory busy; for long rows that is worth another launch
LONG_STEPS = 3  # long rows are cut further while each part still gets at least this many steps
MOST_SPLITS = 8
TENSOR_CORES_BF16 = (8, 0)  # the lowest compute capability whose tensor cores support bfloat16

Constants = dict[str, Any]


class Gated:
    """The activation that a kernel applies to its inputs, as arguments of the kernel."""

    def __init__(self, gate: Gate | None, gated: bool = False, interleaved: bool = False) -> None:
        limit = None if gate is None else gate.limit
        self.numbers = (0.0 if limit is None else limit, 0.0 if gate is None else gate.alpha)
        self.constants: Constants = {
            "GATE": "none" if gate is None else gate.name,
            "GATED": gated,
            "INTERLEAVED": interleaved,
            "CLAMPED": limit is not None,
        }


AS_THEY_ARE = Gated(None)


def _bias(matrix: MatrixLayout) -> Any:
    return DTYPES[STORED_DTYPES[matrix.bias_dtype]] if matrix.bias_offset >= 0 else None


def _quantised(matrix: MatrixLayout) -> Constants:
    return {
        "K": matrix.columns,
        "GROUP": matrix.group_size,
        "BITS": matrix.bits,
        "SCALE_BITS": matrix.scale_bits,
        "SHARED": matrix.shared,
        "BIAS": _bias(matrix),
        "WIDTHS": PLANES[matrix.bits],
    }


def spans(matrix: MatrixLayout) -> tuple[int, int]:
    """How many columns a span has, and how many spans a thread block walks at once.

    Longer spans apply scales less often; shorter ones may leave fewer threads idle at the end.
    """
    width = PLANES[matrix.bits][0]
    lanes = max(1, WARPS * 32 * WORDS_A_THREAD[width] // (COLUMNS * 2 * width))

    def cost(span: int) -> float:
        walked = -(-(matrix.columns // span) // lanes) * lanes * span  # columns, idle ones included
        return walked * (1 + 6 / span)

    return min((n for n in (LONGEST_SPAN, 32, 16) if matrix.group_size % n == 0), key=cost), lanes


def splits(matrix: MatrixLayout, matrices: int) -> int:
    """Into how many parts the columns are cut if a token is multiplied by `matrices` matrices."""
    span, lanes = spans(matrix)
    blocks = matrix.stored_rows // TILE_ROWS * matrices
    steps = -(-matrix.columns // (span * lanes))
    split = 1
    while split < MOST_SPLITS:
        few = blocks * split < FEW_BLOCKS and split * 2 <= steps
        long = blocks * split < ENOUGH_BLOCKS and split * 2 * LONG_STEPS <= steps
        if not few and not long:
            break
        split *= 2
    return split


@functools.cache  # every launch calls this
def _walk(matrix: MatrixLayout, matrices: int, dtype: torch.dtype) -> Constants:
    """The constants of `quantised_gemv`, except those for dtypes and activations."""
    span, lanes = spans(matrix)
    columns = min(COLUMNS, span)
    most = MOST_STEPS_FLOAT32 if dtype == torch.float32 else MOST_STEPS
    return {
        **_quantised(matrix),
        "SPAN": span,
        "COLUMNS": columns,
        "LANES": lanes,
        "SPLIT": splits(matrix, matrices),
        "STEPS": min(most[PLANES[matrix.bits][0]], span // columns),
    }


def _registers(matrix: MatrixLayout, dtype: torch.dtype) -> Constants:
    """Allow a thread all registers where ptxas would use 128 or 168 and spill up to 24 bytes."""
    spills = dtype == torch.float32 or (matrix.bits, matrix.group_size) == (4, 32)
    return {"maxnreg": MOST_REGISTERS} if spills else {}


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability for which launch parameters are chosen."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_capability(device) if cuda else TENSOR_CORES_BF16


def _tile(
    matrix: MatrixLayout, block_cells: int, dtype: torch.dtype, device: torch.device
) -> Constants:
    """The tiles, columns and warps of a block of cells.

    Tiles and columns are few where tensor cores do not support `dtype`, because a product then
    keeps its operands in registers.
    """
    new = capability(device) >= TENSOR_CORES_BF16
    if dtype == torch.float16 or (dtype == torch.bfloat16 and new):
        columns = min(matrix.group_size or 32, 32 if new else 16)
        return {"TILES": 2 if block_cells <= 32 else 1, "COLS": columns, "num_warps": WARPS}
    return {"TILES": 1, "COLS": 16, "num_warps": 4 * WARPS if block_cells > 32 else 2 * WARPS}


def gemv(
    x: Tensor,
    slots: Tensor,
    slot_of_cell: Tensor,
    matrix: MatrixLayout,
    out: Tensor,
    *,
    tokens: int,
    gated: Gated = AS_THEY_ARE,
) -> None:
    """Fill `out` [S, N] with each cell's row of `x` times the matrix in its expert slot.

    `x` has one row for each of T `tokens`, or one for each cell. Cells whose slot is negative stay
    as they are.
    """
    count = out.shape[0]
    cells_a_row = count // x.shape[0]
    bias_at, rows = matrix.bias_offset, matrix.rows
    common = (x.stride(0), cells_a_row, slots.stride(0), matrix.weight_offset)
    dtype = DTYPES[x.dtype]
    if not matrix.group_size:
        plain_gemv[(triton.cdiv(rows, 8), count)](
            x, out, slots, slot_of_cell, *common, bias_at, rows, *gated.numbers,
            K=matrix.columns, STORED=DTYPES[STORED_DTYPES[matrix.dtype]], BIAS=_bias(matrix),
            **gated.constants, DTYPE=dtype, ROWS=8, COLS=512, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        return
    walk = _walk(matrix, count // tokens, x.dtype)
    parts = walk["SPLIT"] * len(walk["WIDTHS"])
    place = out if parts == 1 else out.new_empty(parts, count, rows, dtype=torch.float32)
    quantised_gemv[(matrix.stored_rows // TILE_ROWS, count, parts)](
        x, place, slots, slot_of_cell, *common, matrix.scale_offset, matrix.step_offset, bias_at,
        rows, matrix.stored_rows, *gated.numbers,
        **walk, **gated.constants, DTYPE=dtype, num_warps=WARPS, enable_fp_fusion=True,
        **_registers(matrix, x.dtype),
    )  # fmt: skip
    if parts > 1:
        add_parts[(triton.cdiv(rows, 256), count)](
            place, out, slots, slot_of_cell, slots.stride(0), bias_at, rows,
            PARTS=parts, BIAS=_bias(matrix), DTYPE=dtype, BLOCK=256, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip


def gemm(
    x: Tensor,
    slots: Tensor,
    blocks: Tensor,
    order: Tensor,
    block_cells: int,
    matrix: MatrixLayout,
    out: Tensor,
) -> None:
    """Fill `out` [S, N] for the cells in `order` with their row of `x` times their block's matrix.

    `x` has one row for each token, or one for each cell. A row of `blocks` [B, 3] holds an expert
    slot, and where the block's cells (at most `block_cells`) begin and end in `order`.
    """
    cells_a_row = out.shape[0] // x.shape[0]
    bias_at, rows = matrix.bias_offset, matrix.rows
    common = (x.stride(0), cells_a_row, slots.stride(0), matrix.weight_offset)
    dtype = DTYPES[x.dtype]
    tile = _tile(matrix, block_cells, x.dtype, x.device)
    if not matrix.group_size:
        height = tile.pop("TILES") * 32
        plain_gemm[(triton.cdiv(rows, height), len(blocks))](
            x, out, slots, blocks, order, *common, bias_at, rows,
            K=matrix.columns, STORED=DTYPES[STORED_DTYPES[matrix.dtype]], BIAS=_bias(matrix),
            DTYPE=dtype, ROWS=height, CELLS=block_cells, **tile, enable_fp_fusion=True,
        )  # fmt: skip
        return
    parts = 8 // matrix.bits if len(PLANES[matrix.bits]) == 1 else 1
    height = tile["TILES"] * TILE_ROWS
    quantised_gemm[(triton.cdiv(matrix.stored_rows, height), len(blocks))](
        x, out, slots, blocks, order, *common, matrix.scale_offset, matrix.step_offset, bias_at,
        rows, matrix.stored_rows,
        **_quantised(matrix), DTYPE=dtype, PARTS=parts, CELLS=block_cells, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip


def activate(x: Tensor, order: Tensor, gated: Gated, out: Tensor) -> None:
    """Fill `out` [S, I] with the activation of `x` [S, 2I] or [S, I] for the cells in `order`."""
    inner = out.shape[1]
    gate_rows[(len(order), triton.cdiv(inner, 1024))](
        x, out, order, *gated.numbers, INNER=inner, **gated.constants, DTYPE=DTYPES[x.dtype],
        BLOCK=1024, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
