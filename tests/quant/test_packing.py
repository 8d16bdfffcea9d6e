"""Codes to bytes and back, and the documented order of the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.packing import TILE_ROWS, pack, padded_rows, unpack

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@settings(max_examples=40)
@given(tiles=st.integers(1, 4), pairs=st.integers(1, 40), seed=st.integers(0, 999))
def test_4_bit_codes_survive_packing(tiles: int, pairs: int, seed: int) -> None:
    codes = random_codes(tiles * TILE_ROWS, 2 * pairs, 4, seed)
    packed = pack(codes, 4)
    assert packed.shape == (tiles * TILE_ROWS, pairs)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, 4), codes)


@settings(max_examples=40)
@given(rows=st.integers(1, 130), columns=st.integers(1, 80), seed=st.integers(0, 999))
def test_8_bit_codes_are_stored_row_by_row(rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, 8, seed)
    packed = pack(codes, 8)
    assert packed.flatten().tolist() == [code for row in codes.tolist() for code in row]
    assert torch.equal(unpack(packed, 8), codes)


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
    """One code set at a time sets one half of one byte, another one each time."""
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
    assert torch.equal(pack(codes, 4), theirs)


def test_codes_of_any_memory_layout_pack_alike() -> None:
    codes = random_codes(64, 64, 4, seed=0)
    assert torch.equal(pack(codes.t().contiguous().t().contiguous(), 4), pack(codes, 4))
    assert torch.equal(pack(codes.t(), 8), codes.t().contiguous())


@pytest.mark.parametrize(
    ("rows", "bits", "stored"),
    [(1, 4, 64), (64, 4, 64), (65, 4, 128), (1, 8, 1), (65, 8, 65), (65, 16, 65), (65, 32, 65)],
)
def test_only_4_bit_rows_are_padded_to_whole_tiles(rows: int, bits: int, stored: int) -> None:
    assert padded_rows(rows, bits) == stored
