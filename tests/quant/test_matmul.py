"""Products from packed bytes agree with the reference, and the right way is chosen for each.

Letters: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from offload.quant import matmul as module
from offload.quant.codes import PLANES
from offload.quant.hqq import quantize
from offload.quant.kernels import compiler, cpu
from offload.quant.kernels.compiler import Processor
from offload.quant.matmul import (
    MOST_GEMV_TOKENS,
    MOST_PACKED_TOKENS,
    dequantize,
    gpu_kernel_works,
    matmul,
    matmul_gpu,
    matmul_packed,
    matmul_reference,
    matmul_unpacked,
    sample_matrix,
    sample_record,
    take_rows,
)
from offload.quant.record import MatrixSpec, MatrixView, plan_layout, view_record
from offload.quant.scheme import BITS, Scheme
from tests.interpreter import quicken
from tests.quant.records import encode_record

WAYS = [matmul_packed, matmul_unpacked]
QUANTISED = [bits for bits in BITS if bits < 16]


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
    """The matrix [N, K] in float64, read weight by weight from the documented order of bytes."""
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


def close_to_reference(out: Tensor, x: Tensor, view: MatrixView) -> None:
    """Fail unless `out` is the product within the rounding of x's dtype."""
    exact = matmul_reference(x.double(), view)
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    assert out.is_contiguous()
    allowed = 4 * torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 1e-5
    largest = float(exact.abs().max())
    torch.testing.assert_close(out.double(), exact, rtol=allowed, atol=allowed * largest)


@settings(max_examples=50, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    bits=st.sampled_from(QUANTISED),
    scale_bits=st.sampled_from([8, 16]),
    group_size=st.sampled_from([16, 32, 64, 128, 256]),
    columns=st.integers(1, 40).map(lambda n: n * 16),
    rows=st.integers(1, 200),
    count=st.sampled_from([1, 2, 4, 7]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    bias=st.booleans(),
)
@example(matmul_packed, 5, 8, 64, 576, 64, 3, torch.bfloat16, False)
def test_kernels_give_the_reference(
    way: module.Matmul,
    bits: int,
    scale_bits: int,
    group_size: int,
    columns: int,
    rows: int,
    count: int,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    view = sample_matrix(rows, columns, Scheme(bits, group_size, scale_bits), bias=bias)
    x = tokens(count, columns, dtype)
    close_to_reference(way(x, view), x, view)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_unpacking_gives_the_dequantised_matrix_bit_for_bit(bits: int, scale_bits: int) -> None:
    view = sample_matrix(256, 96, Scheme(bits, 32, scale_bits))
    for dtype in (torch.bfloat16, torch.float32):
        slab = cpu.dequantize_rows(view, dtype, 64, 192)  # [K, rows]
        assert torch.equal(slab.t(), dequantize(view, dtype)[64:192])


@pytest.mark.parametrize("bits", QUANTISED)
def test_number_of_threads_does_not_show(bits: int) -> None:
    view, x = sample_matrix(320, 256, Scheme(bits)), tokens(4, 256)
    assert cpu.ALONE < 320 * 256 * 4
    alone = [way(x, view) for way in WAYS]
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(WAYS[0](x, view), alone[0])
        close_to_reference(WAYS[1](x, view), x, view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_tokens_beside_it_do_not_change_a_tokens_result(dtype: torch.dtype) -> None:
    view, x = sample_matrix(100, 96, Scheme(4, 32)), tokens(9, 96, dtype)
    together = matmul_packed(x, view)
    for count in (1, 2, 3, 4, 5, 6):
        assert torch.equal(matmul_packed(x[:count], view), together[:count])


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    view, x = sample_matrix(300, 64, Scheme(4), bias=True), tokens(40, 64, torch.float32)
    for weights in (1, 2 * 64 * 64, 2**30):
        monkeypatch.setattr(module, "SLAB_WEIGHTS", weights)
        close_to_reference(matmul_unpacked(x, view), x, view)


def test_tokens_may_lie_anywhere() -> None:
    view, x = sample_matrix(64, 128, Scheme(4)), tokens(128, 6, torch.float32).t()
    assert not x.is_contiguous()
    close_to_reference(matmul(x, view), x, view)
    assert matmul(x[:0], view).shape == (0, 64)


def test_what_kernels_do_not_know_gets_the_reference() -> None:
    view, x = sample_matrix(64, 128, Scheme(4)), tokens(2, 128, torch.float64)
    assert torch.equal(matmul(x, view), matmul_reference(x, view))
    x = tokens(2, 128, torch.float32).requires_grad_()
    matmul(x, view).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["haswell", "x86-64", "skylake-avx512"])
def test_code_for_other_processors_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is compiled for each processor, and run where this one has the instructions."""
    ours = compiler.this_processor().features.split(",")
    needed = {"haswell": "+avx2", "x86-64": "+sse2", "skylake-avx512": "+avx512vl"}[name]
    if needed not in ours:
        pytest.skip(f"this processor has no {needed[1:]}")
    features = "+avx512f" if "512" in name else ""
    monkeypatch.setattr(compiler, "this_processor", lambda: Processor(name, features))
    monkeypatch.setattr(cpu, "code_for", cpu.code_for.__wrapped__)
    for bits in QUANTISED:
        view, x = sample_matrix(64, 96, Scheme(bits, 32)), tokens(4, 96)
        close_to_reference(matmul_packed(x, view), x, view)
    close_to_reference(matmul_unpacked(x, view), x, view)


FRESH_PROCESS = """
import sys
import torch
from offload.quant import matmul
from offload.quant.scheme import Scheme
assert "llvmlite" not in sys.modules, "a model without packed weights would pay for it"
assert not matmul.bfloat16_is_quick()
view, x = matmul.sample_matrix(128, 128, Scheme(4)), torch.randn(3, 128).bfloat16()
for way in (matmul.matmul_packed, matmul.matmul_unpacked):
    exact = matmul.matmul_reference(x.float(), view)
    torch.testing.assert_close(way(x, view).float(), exact, rtol=0.02, atol=0.02)
"""


def test_llvm_is_loaded_late_and_products_are_right_without_onednns_bfloat16() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("count", [1, MOST_PACKED_TOKENS, MOST_PACKED_TOKENS + 1])
def test_few_tokens_leave_the_matrix_packed(count: int) -> None:
    view, x = sample_matrix(100, 128, Scheme(4)), tokens(count)
    way = matmul_packed if count <= MOST_PACKED_TOKENS else matmul_unpacked
    assert torch.equal(matmul(x, view), way(x, view))


@pytest.fixture
def _untried() -> None:
    """Forget what is known about this machine's kernels."""
    module.cpu_kernel_works.cache_clear()


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("failure", [ImportError("no llvmlite"), RuntimeError("no such target")])
def test_machine_without_kernels_gets_the_reference_and_is_told(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(cpu, "code_for", fail)
    view, x = sample_matrix(70, 64, Scheme(3)), tokens(2, 64)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(matmul(x, view), matmul_reference(x, view))
        matmul(x, view)
    assert [str(failure) in record.message for record in caplog.records] == [True]
    module.cpu_kernel_works.cache_clear()


@pytest.mark.usefixtures("_untried")
def test_kernel_that_mixes_up_rows_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = cpu.multiply
    monkeypatch.setattr(cpu, "multiply", lambda x, view: right(x, view).roll(1, dims=1))
    view, x = sample_matrix(70, 64, Scheme(3)), tokens(2, 64)
    assert torch.equal(matmul(x, view), matmul_reference(x, view))
    assert "wrong" in caplog.text
    module.cpu_kernel_works.cache_clear()


def test_unquantised_matrix_is_multiplied_as_it_is() -> None:
    view, x = matrix(bits=16, bias=True), tokens(2)
    assert torch.equal(matmul(x, view), matmul_reference(x, view))


@pytest.mark.parametrize("bits", [4, 16])
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


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_takes_a_large_matrix_in_parts(
    scale_bits: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = sample_matrix(300, 96, Scheme(5, 16, scale_bits), bias=bias)
    x = tokens(3, 96, torch.float32)
    whole = matmul_reference(x, view)
    monkeypatch.setattr(module, "REFERENCE_WEIGHTS", 128 * 96)  # two tiles at a time
    torch.testing.assert_close(matmul_reference(x, view), whole)


def test_default_dtype_of_torch_changes_nothing() -> None:
    """Users set it, and so does transformers while another thread loads a model."""
    view = sample_matrix(128, 256, Scheme(4, 64))
    x = torch.randn(3, 256)
    expected = matmul_packed(x, view)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    solved = quantize(weight, 4, 64)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(matmul_packed(x, view), expected)
        again = quantize(weight, 4, 64)
    finally:
        torch.set_default_dtype(before)
    assert again.scale.dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(again, solved, strict=True))


@pytest.mark.parametrize("count", [1, MOST_GEMV_TOKENS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_single_matrix_is_multiplied_by_the_kernels_of_experts(count: int, bias: bool) -> None:
    quicken()
    view, x = sample_matrix(70, 64, Scheme(4, 32), bias=bias), tokens(count, 64)
    close_to_reference(matmul_gpu(x, view), x, view)


def test_kernels_find_a_matrix_behind_others_in_its_record() -> None:
    quicken()
    specs = tuple(MatrixSpec(name, 64, 32, True, torch.bfloat16) for name in ("a", "b"))
    layout = plan_layout(specs, Scheme(8, 32))
    view = view_record(torch.stack([sample_record(layout, n) for n in (1, 2)])[1], layout)["b"]
    x = tokens(2, 32)
    close_to_reference(matmul_gpu(x, view), x, view)


def test_gpu_kernels_are_tried_before_they_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quicken()
    cpu_device = torch.device("cpu")
    assert gpu_kernel_works(Scheme(4, 64), torch.bfloat16, cpu_device)
    gpu_kernel_works.cache_clear()
    monkeypatch.setattr(module, "matmul_gpu", lambda x, view: matmul_reference(x, view) + 1)
    assert not gpu_kernel_works(Scheme(4, 64), torch.bfloat16, cpu_device)
    assert "wrong results" in caplog.text
    gpu_kernel_works.cache_clear()


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_taking_rows_asks_nothing_of_the_host(scale_bits: int) -> None:
    """A CUDA graph cannot be captured if values are read back; fake tensors have none to read."""
    view = sample_matrix(100, 64, Scheme(5, 16, scale_bits))
    with FakeTensorMode() as mode:
        parts = (view.weight, view.scales, view.steps)
        weight, scales, steps = (part if part is None else mode.from_tensor(part) for part in parts)
        fake = replace(view, weight=weight, scales=scales, steps=steps)
        assert take_rows(fake, torch.zeros(3, dtype=torch.long), torch.bfloat16).shape == (3, 64)


@pytest.mark.parametrize("tokens", [25, 32, 33, 100])
@pytest.mark.parametrize("bits", [4, 16])
def test_bfloat16_is_multiplied_in_few_shapes(
    tokens: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN compiles a kernel for each shape, and an expert's number of tokens keeps changing."""
    view = module.sample_matrix(64, 64, Scheme(bits, 32, 16), bias=True)
    x = torch.randn(tokens, 64).bfloat16()
    shapes = []
    way = module.matmul_of_shape
    monkeypatch.setattr(
        module, "matmul_of_shape", lambda x, view: shapes.append(len(x)) or way(x, view)
    )
    out = module.matmul(x, view)
    assert shapes == [-(-tokens // 32) * 32]
    assert out.shape == (tokens, 64)
    expected = module.matmul_reference(x.float(), view)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
