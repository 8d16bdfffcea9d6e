"""Codes [N, K] to bytes and back.

Knows: the order of the bytes. Does not know: where they lie in a record, nor what they multiply.

4 bits are packed in *tiles* of 64 rows: for each column k, 32 bytes hold rows 0..31 in their low
halves and rows 32..63 in their high halves. A tile is contiguous, so a vector unit reads one column
of 64 outputs with one load; it is also the order `aten::_weight_int4pack_mm_for_cpu` reads on
AVX-512. N is padded to a whole tile with zero weights. 8 bits are plain row-major bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 64


def padded_rows(rows: int, bits: int) -> int:
    """Rows stored for a matrix of `rows` rows at `bits` bits."""
    return -(-rows // TILE_ROWS) * TILE_ROWS if bits == 4 else rows


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` [N, K] uint8 (N already padded) into bytes [N, K * bits / 8] uint8."""
    rows, columns = codes.shape
    if bits == 8:
        return codes.contiguous()
    tiles = codes.view(rows // TILE_ROWS, 2, TILE_ROWS // 2, columns)  # [tile, half, 32, K]
    both = tiles[:, 0] | (tiles[:, 1] << 4)  # [tile, 32, K]
    return both.transpose(1, 2).contiguous().view(rows, columns // 2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: bytes [N, K * bits / 8] to codes [N, K] uint8."""
    if bits == 8:
        return packed
    rows, half = packed.shape
    tiles = packed.view(rows // TILE_ROWS, half * 2, TILE_ROWS // 2)  # [tile, K, 32]
    both = torch.stack((tiles & 15, tiles >> 4), dim=1)  # [tile, half, K, 32]
    return both.transpose(2, 3).reshape(rows, half * 2)
