"""Products from packed bytes: the reference, the fast path, and who is chosen when."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import matmul as module
from quant.matmul import (
    cpu_int4_works,
    dequantize,
    matmul,
    matmul_cpu_int4,
    matmul_reference,
    take_rows,
)
from quant.packing import PLANES, pack
from quant.record import MatrixSpec, MatrixView, encode_record, plan_layout, view_record
from quant.scheme import BITS, Scheme

# M tokens, K inputs, N outputs

# Not `cpu_int4_works()`: that is under test.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_avx512 = pytest.mark.skipif(not AVX512, reason="the int4 kernel needs AVX-512")


def matrix(
    rows: int = 128,
    columns: int = 128,
    *,
    bits: int = 4,
    group_size: int = 64,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> MatrixView:
    """A random matrix in a record."""
    torch.manual_seed(rows * columns + bits)
    layout = plan_layout((MatrixSpec("m", rows, columns, bias, dtype),), Scheme(bits, group_size))
    record = torch.empty(layout.record_bytes, dtype=torch.uint8)
    values = torch.randn(rows).to(dtype) if bias else None
    weight = (torch.randn(rows, columns) * columns**-0.5).to(dtype)
    encode_record(record, layout, {"m": (weight, values)})
    return view_record(record, layout)["m"]


def tokens(count: int, columns: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(count)
    return torch.randn(count, columns).to(dtype)


def dense(view: MatrixView) -> Tensor:
    """The matrix [N, K] in float64, one weight at a time from the documented order of bytes."""
    layout = view.layout
    if view.scales is None:
        return view.weight.double()
    data = view.weight.flatten().tolist()
    scales = view.scales.double().tolist()  # [K/g][N][2]
    values = torch.empty(layout.rows, layout.columns, dtype=torch.float64)
    for n in range(layout.rows):
        for k in range(layout.columns):
            tile, place = divmod(n, 64)
            start = tile * layout.columns * layout.bits * 8
            code = low = 0
            for width in PLANES[layout.bits]:
                part, byte = divmod(place, 8 * width)
                value = data[start + k * 8 * width + byte]
                code |= (value >> (part * width) & (2**width - 1)) << low
                low, start = low + width, start + layout.columns * 8 * width
            scale, offset = scales[k // layout.group_size][n]
            values[n, k] = (code - 2 ** (layout.bits - 1)) * scale + offset
    return values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_the_product_with_the_dequantised_matrix(bits: int, bias: bool) -> None:
    view = matrix(70, 96, bits=bits, group_size=32, bias=bias)
    x = tokens(3, 96, torch.float32)
    expected = x.double() @ dense(view).t()
    if view.bias is not None:
        expected += view.bias.double()
    out = matmul_reference(x, view)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_matrix_is_exact_in_float32(bits: int) -> None:
    view = matrix(65, 64, bits=bits)
    torch.testing.assert_close(
        dequantize(view, torch.float32).double(), dense(view), rtol=1e-6, atol=1e-7
    )


@needs_avx512
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [64, 100, 192])
@pytest.mark.parametrize(
    ("group_size", "columns", "bias"),
    [(32, 96, False), (64, 128, True), (128, 256, False), (256, 256, True)],
)
def test_fast_path_gives_the_reference_within_bfloat16(
    count: int, rows: int, group_size: int, columns: int, bias: bool
) -> None:
    view = matrix(rows, columns, group_size=group_size, bias=bias)
    x = tokens(count, columns)
    fast = matmul_cpu_int4(x, view)
    exact = matmul_reference(x.float(), view)
    assert fast.shape == (count, rows)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(fast, matmul_reference(x, view), rtol=0.02, atol=0.03)


@needs_avx512
def test_fast_path_gives_the_same_bits_each_time() -> None:
    view, x = matrix(100, 128, bias=True), tokens(3)
    assert torch.equal(matmul_cpu_int4(x, view), matmul_cpu_int4(x, view))


def test_probe_answers_yes_or_no() -> None:
    assert isinstance(cpu_int4_works(), bool)


@needs_avx512
def test_probe_finds_the_kernel_on_avx512() -> None:
    assert cpu_int4_works()


def read_in_tiles_of(rows_of_a_tile: int) -> MatrixView:
    """The probe's matrix as a kernel with tiles of `rows_of_a_tile` rows takes its bytes."""
    view = module._probe_view()
    layout = view.layout
    half = rows_of_a_tile // 2
    tiles = view.weight.reshape(-1, layout.columns, half)  # [tile, K, half]
    codes = torch.cat((tiles & 15, tiles >> 4), dim=2)  # [tile, K, rows of a tile]
    codes = codes.transpose(1, 2).reshape(layout.rows, layout.columns)
    return MatrixView(layout, pack(codes, 4), view.scales, None, view.bias)


@pytest.mark.parametrize("rows_of_a_tile", [16, 32, 64, 128])
def test_probe_accepts_only_a_kernel_that_reads_tiles_of_64_rows(
    rows_of_a_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AVX-512 torch reads tiles of 32 rows."""
    misread = read_in_tiles_of(rows_of_a_tile)
    monkeypatch.setattr(module, "matmul_cpu_int4", lambda x, _: matmul_reference(x, misread))
    assert cpu_int4_works.__wrapped__() is (rows_of_a_tile == 64)


def test_probe_tells_rows_apart() -> None:
    """A kernel that mixes up rows, or the halves of a byte, must be found."""
    view = module._probe_view()
    x = torch.eye(view.layout.columns)
    weight = matmul_reference(x, view).t()  # [N, K]
    assert len(weight.unique(dim=0)) == view.layout.rows


@pytest.mark.parametrize("error", [RuntimeError("not built"), AttributeError("gone")])
def test_probe_answers_no_where_the_kernel_is_missing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(x: Tensor, view: MatrixView) -> Tensor:
        raise error

    monkeypatch.setattr(module, "matmul_cpu_int4", missing)
    assert cpu_int4_works.__wrapped__() is False


CHECK_THIS_CPU = """
import sys, types
import torch
# hqq takes seconds to import and is not needed here.
sys.modules["hqq"] = sys.modules["hqq.core"] = types.ModuleType("hqq")
sys.modules["hqq.core.quantize"] = types.ModuleType("quantize")
sys.modules["hqq.core.quantize"].Quantizer = None
from quant.matmul import matmul, matmul_reference
from quant.packing import PLANES, pack
from quant.record import MatrixLayout, MatrixView
torch.manual_seed(0)
layout = MatrixLayout("m", 128, 128, 4, 64, 16, "bfloat16", "bfloat16", 0, 0, -1, -1)
codes = torch.randint(0, 16, (128, 128), dtype=torch.uint8)
view = MatrixView(layout, pack(codes, 4), torch.rand(2, 128, 2).bfloat16() * 0.05, None, None)
x = torch.randn(3, 128).bfloat16()
torch.testing.assert_close(
    matmul(x, view).float(), matmul_reference(x.float(), view), rtol=0.02, atol=0.05
)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86's levels")
@pytest.mark.parametrize("instructions", ["avx2", "default"])
def test_products_are_right_without_avx512(instructions: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK_THIS_CPU],
        env={**os.environ, "ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_float32_tokens_get_the_reference_bit_for_bit(bits: int) -> None:
    view = matrix(bits=bits, bias=True)
    x = tokens(2, dtype=torch.float32)
    assert torch.equal(matmul(x, view), matmul_reference(x, view))


@pytest.mark.parametrize(
    ("bits", "group_size", "count"),
    [(8, 64, 2), (16, 64, 2), (4, 16, 2), (4, 64, module.INT4_MAX_TOKENS + 1)],
)
def test_what_the_fast_path_cannot_do_gets_the_reference(
    bits: int, group_size: int, count: int
) -> None:
    view, x = matrix(bits=bits, group_size=group_size), tokens(count)
    assert torch.equal(matmul(x, view), matmul_reference(x, view))


def test_machine_without_the_kernel_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_int4_works", lambda: False)
    view, x = matrix(), tokens(2)
    assert torch.equal(matmul(x, view), matmul_reference(x, view))


@needs_avx512
@pytest.mark.parametrize("count", [1, module.INT4_MAX_TOKENS])
def test_few_bfloat16_tokens_take_the_fast_path(count: int) -> None:
    view, x = matrix(100, 128), tokens(count)
    assert torch.equal(matmul(x, view), matmul_cpu_int4(x, view))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_result_has_the_dtype_of_the_tokens_whatever_the_bias_is_stored_as(
    bits: int, stored: torch.dtype, computed: torch.dtype
) -> None:
    view = matrix(bits=bits, bias=True, dtype=stored)
    assert matmul(tokens(2, dtype=computed), view).dtype == computed


@pytest.mark.parametrize(("bits", "scale_bits"), [(b, s) for b in BITS[:-1] for s in (8, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_single_rows_are_those_of_the_whole_matrix(
    bits: int, scale_bits: int, dtype: torch.dtype
) -> None:
    layout = plan_layout((MatrixSpec("m", 100, 96, False, dtype),), Scheme(bits, 16, scale_bits))
    record = torch.empty(layout.record_bytes, dtype=torch.uint8)
    encode_record(record, layout, {"m": (torch.randn(100, 96).to(dtype), None)})
    view = view_record(record, layout)["m"]
    rows = torch.tensor([99, 0, 63, 64, 0])
    torch.testing.assert_close(take_rows(view, rows, dtype), dequantize(view, dtype)[rows])
