"""Codes survive packing into bytes, in the documented order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.quant.codes import PLANES, TILE_ROWS, pack, padded_rows, unpack, unpack_rows


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@settings(max_examples=80)
@given(
    tiles=st.integers(1, 3),
    columns=st.integers(1, 40),
    bits=st.sampled_from(tuple(PLANES)),
    seed=st.integers(0, 999),
)
def test_codes_survive_packing_and_nothing_is_rounded_up(
    tiles: int, columns: int, bits: int, seed: int
) -> None:
    codes = random_codes(tiles * TILE_ROWS, columns, bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (tiles, columns * bits * 8)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", PLANES)
def test_order_is_the_documented_one(bits: int) -> None:
    """Every bit of every code is where the docstring of `quant.codes` says."""
    tiles, columns = 2, 3
    codes = random_codes(tiles * 64, columns, bits, seed=bits)
    packed = pack(codes, bits).tolist()
    for row in range(tiles * 64):
        tile, place = divmod(row, 64)
        for k in range(columns):
            code = low = start = 0
            for width in PLANES[bits]:
                part, byte = divmod(place, 8 * width)
                value = packed[tile][start + k * 8 * width + byte]
                code |= (value >> (part * width) & (2**width - 1)) << low
                low, start = low + width, start + columns * 8 * width
            assert code == int(codes[row, k])


def test_codes_of_any_memory_layout_pack_alike() -> None:
    for bits in PLANES:
        codes = random_codes(64, 64, bits, seed=0)
        assert torch.equal(pack(codes.t(), bits), pack(codes.t().contiguous(), bits))


@pytest.mark.parametrize(("rows", "stored"), [(1, 64), (64, 64), (65, 128)])
def test_rows_are_padded_to_whole_tiles(rows: int, stored: int) -> None:
    assert padded_rows(rows) == stored


@pytest.mark.parametrize("bits", PLANES)
def test_single_rows_are_those_of_the_whole(bits: int) -> None:
    codes = random_codes(192, 33, bits, seed=bits)
    rows = torch.tensor([191, 0, 63, 64, 7, 7])
    assert torch.equal(unpack_rows(pack(codes, bits), bits, rows), codes[rows])
