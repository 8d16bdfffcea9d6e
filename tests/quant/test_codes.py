"""Codes survive packing into bytes, in the documented order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.quant.codes import PLANES, TILE_ROWS, pack, padded_rows, unpack, unpack_rows

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


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


def test_4_bit_tile_holds_rows_0_to_31_in_low_halves_and_32_to_63_in_high_ones() -> None:
    tiles, columns = 2, 6
    codes = random_codes(tiles * 64, columns, 4, seed=0)
    expected = [
        int(codes[64 * tile + row, k]) | int(codes[64 * tile + 32 + row, k]) << 4
        for tile in range(tiles)
        for k in range(columns)
        for row in range(32)
    ]
    assert pack(codes, 4).flatten().tolist() == expected


def test_each_code_has_a_half_byte_of_its_own() -> None:
    """Setting one code at a time sets one half of one byte, a different one each time."""
    rows, columns = 64, 2
    seen = set()
    for row in range(rows):
        for k in range(columns):
            codes = torch.zeros(rows, columns, dtype=torch.uint8)
            codes[row, k] = 15
            (index,) = (packed := pack(codes, 4).flatten()).nonzero().flatten().tolist()
            assert int(packed[index]) in (0x0F, 0xF0)
            seen.add((index, int(packed[index])))
    assert len(seen) == rows * columns


@pytest.mark.skipif(not AVX512, reason="torch's own order of bytes differs without AVX-512")
def test_4_bit_order_is_that_of_torchs_kernel_on_avx512() -> None:
    codes = random_codes(128, 64, 4, seed=0)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(pack(codes, 4).flatten(), theirs.flatten())


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
