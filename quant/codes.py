"""Packs codes [N, K] and scales into bytes, and unpacks them.

Rows are stored in *tiles* of 64, so N is padded to whole tiles. A tile holds its codes column by
column, so that a vector unit reads one column of 64 outputs with one load. Codes of 3, 5 and 6 bits
are split into *planes* whose widths divide a byte (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), low bits
first. A tile consists of its planes, one after the other, and wastes no bit.

A plane of `p` bits holds `8 * p` bytes for each column: byte `j` holds rows `j`, `j + 8p`,
`j + 16p`, ... from its lowest bits upwards.

Letters: N rows, K columns, g columns of a group, s groups that share a step, T rows asked for.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ROWS = 64
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def padded_rows(rows: int) -> int:
    """How many rows are stored for a quantised matrix: `rows`, rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` [N, K] uint8, N a multiple of 64, into bytes [N / 64, K * bits * 8] uint8."""
    rows, columns = codes.shape
    tiles = codes.view(rows // TILE_ROWS, TILE_ROWS, columns).transpose(1, 2)  # [tile, K, 64]
    planes = []
    low = 0
    for width in PLANES[bits]:
        plane = (tiles >> low) & (2**width - 1)
        parts = plane.reshape(*plane.shape[:2], 8 // width, 8 * width)  # [tile, K, part, byte]
        packed = parts[:, :, 0].clone()
        for part in range(1, 8 // width):
            packed |= parts[:, :, part] << (part * width)
        planes.append(packed.flatten(1))
        low += width
    return torch.cat(planes, dim=1)


def _planes(packed: Tensor, bits: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield each plane's width, its lowest bit in a code, and its bytes [N / 64, K, 8 * width]."""
    tiles, size = packed.shape
    low = 0
    for width in PLANES[bits]:
        plane = packed[:, size * low // bits : size * (low + width) // bits]
        yield width, low, plane.view(tiles, -1, 8 * width)
        low += width


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes [N, K] uint8 that `pack` made into bytes [N / 64, K * bits * 8]."""
    tiles, size = packed.shape
    codes = packed.new_zeros(tiles, size // (8 * bits), TILE_ROWS)
    for width, low, plane in _planes(packed, bits):
        parts = [(plane >> (part * width)) & (2**width - 1) for part in range(8 // width)]
        codes |= torch.cat(parts, dim=2) << low
    return codes.transpose(1, 2).flatten(0, 1)


def unpack_rows(packed: Tensor, bits: int, rows: Tensor) -> Tensor:
    """The codes [T, K] uint8 of only those rows whose numbers are in `rows` [T]."""
    tile, place = rows // TILE_ROWS, rows % TILE_ROWS
    codes = packed.new_zeros(len(rows), packed.shape[1] // (8 * bits))
    for width, low, plane in _planes(packed, bits):
        shift = place // (8 * width) * width
        parts = plane[tile, :, place % (8 * width)] >> shift.to(torch.uint8).unsqueeze(1)
        codes |= (parts & (2**width - 1)) << low
    return codes


MOST_SHARED = 256  # the most groups that share a step, as many as in mixtral-offloading
STEP_VALUES = 4  # step and base of a row's scales, then step and base of its offsets


def shared_steps(groups: int) -> int:
    """How many of a row's `groups` share a step: the largest divisor not above `MOST_SHARED`."""
    return next(n for n in range(min(groups, MOST_SHARED), 0, -1) if groups % n == 0)


def encode_scales(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pairs [K/g, N, 2] float32 of scale and offset.

    Returns bytes [K/g, N, 2] uint8 and steps [K/g/s, N, 4] bfloat16; a pair is
    `bytes * step + base`.
    """
    groups, rows, _ = pairs.shape
    spans = pairs.reshape(-1, shared_steps(groups), rows, 2)  # [K/g/s, s, N, 2]
    low, high = spans.aminmax(dim=1)  # [K/g/s, N, 2] each
    steps = torch.stack(((high - low) / 255, low), dim=-1).bfloat16()  # as stored
    step, base = steps.float().unsqueeze(1).unbind(-1)
    codes = ((spans - base) / step.clamp(min=1e-30)).round_().clamp_(0, 255)
    return codes.to(torch.uint8).view(groups, rows, 2), steps.flatten(2)


def decode_scales(codes: Tensor, steps: Tensor) -> Tensor:
    """The pairs [K/g, N, 2] float32 that `encode_scales` encoded."""
    groups, rows, _ = codes.shape
    step, base = steps.float().view(-1, 1, rows, 2, 2).unbind(-1)  # [K/g/s, 1, N, 2] each
    spans = codes.view(step.shape[0], -1, rows, 2)
    return (spans.float() * step + base).view(groups, rows, 2)
