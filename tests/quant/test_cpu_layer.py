"""The CPU's kernels for few tokens: a layer's experts in one call, dense rows, norms.

Letters: T tokens, k experts per token, H hidden, I inner, N rows, K columns.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from offload.quant.experts import decode_reference, routine_for
from offload.quant.kernels import cpu
from offload.quant.kernels.compiler import (
    Processor,
    compiled_layer,
    compiled_rows,
    this_processor,
)
from offload.quant.kernels.layer import LayerKernel
from offload.quant.kernels.rows import RowsKernel
from offload.quant.matmul import matmul_reference, sample_record
from offload.quant.program import FUNCTIONS, OAI, Gate, Program
from offload.quant.record import MatrixSpec, plan_layout
from offload.quant.scheme import Scheme

BF16, FP32 = torch.bfloat16, torch.float32
T, K, EXPERTS = 3, 2, 4
HERE = this_processor()
# What a processor without AVX-512 runs. Vectors are halved, and no pairs are multiplied.
NARROW = Processor(
    "haswell",
    ",".join(f for f in HERE.features.split(",") if "avx512" not in f and "avx10" not in f),
)
X86 = pytest.mark.skipif("avx2" not in HERE.features, reason="a processor of another kind")
GATES = [
    *((Gate(name), True, False) for name in FUNCTIONS),
    (Gate("silu", limit=7.0), True, True),
    (Gate(OAI, limit=7.0, alpha=1.702), True, True),
    (Gate("relu2"), False, False),
]


def program(
    gate: Gate = Gate("silu"),  # noqa: B008
    gated: bool = True,
    interleaved: bool = False,
    scheme: Scheme = Scheme(4, 32),  # noqa: B008
    bias: bool = False,
) -> Program:
    up = MatrixSpec("up", 96 * (1 + gated), 128, bias, BF16)
    down = MatrixSpec("down", 128, 96, bias, BF16)
    layout = plan_layout((up, down), scheme)
    return Program(layout, gated, interleaved, gate, lambda x: gate(x, gated, interleaved))


class Case:
    """Tokens and where each of their experts' records lies."""

    def __init__(self, made: Program, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(1)
        self.program = made
        self.records = torch.stack([sample_record(made.layout, seed) for seed in range(EXPERTS)])
        self.slots = torch.randint(0, EXPERTS, (T * K,), generator=random, dtype=torch.int32)
        self.hidden = torch.randn(T, 128, generator=random, dtype=FP32).to(dtype)
        self.weights = torch.rand(T, K, generator=random, dtype=FP32)

    def reference(self) -> Tensor:
        cells = self.hidden.new_zeros(T * K, 128)
        where = self.hidden, self.records, self.slots, self.program, cells
        decode_reference(*where, matmul_reference)
        return cells

    def computed(self, routine: cpu.LayerRoutine, tokens: range = range(T)) -> Tensor:
        cells = self.hidden.new_zeros(len(tokens) * K, 128)
        chosen = self.slots[tokens.start * K : tokens.stop * K].tolist()
        records = [self.records[slot].data_ptr() for slot in chosen]
        hidden = self.hidden[tokens.start : tokens.stop]
        routine(hidden, records, list(range(len(chosen))), cells)
        return cells


def routine_on(made: Program, dtype: torch.dtype, processor: Processor) -> cpu.LayerRoutine:
    kernel = LayerKernel(made, dtype == BF16, processor.dots)
    return cpu.LayerRoutine(compiled_layer(kernel, processor), made)


def agrees(made: Program, dtype: torch.dtype, processor: Processor) -> None:
    case = Case(made, dtype)
    expected = case.reference()
    error = (case.computed(routine_on(made, dtype, processor)) - expected).abs().max()
    assert error <= (0.02 if dtype == BF16 else 2e-6) * expected.abs().max()


@pytest.mark.parametrize(("gate", "gated", "interleaved"), GATES)
@pytest.mark.parametrize("bias", [False, True])
def test_activations_are_the_models(gate: Gate, gated: bool, interleaved: bool, bias: bool) -> None:
    agrees(program(gate, gated, interleaved, bias=bias), FP32, HERE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width_is_computed(bits: int) -> None:
    agrees(program(scheme=Scheme(bits, 32, 8)), BF16, HERE)


@X86
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_processor_without_avx512_computes_the_same(dtype: torch.dtype) -> None:
    agrees(program(), dtype, NARROW)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_neither_threads_nor_other_tokens_show(dtype: torch.dtype) -> None:
    case = Case(program(), dtype)
    routine = routine_on(case.program, dtype, HERE)
    torch.set_num_threads(1)
    alone = case.computed(routine)
    torch.set_num_threads(2)
    assert torch.equal(case.computed(routine), alone)
    assert torch.equal(case.computed(routine, range(1, 2)), alone[K : 2 * K])


def test_a_sum_takes_the_weights_and_every_cell() -> None:
    case = Case(program(), FP32)
    cells = case.reference()
    expected = (cells.view(T, K, -1) * case.weights.unsqueeze(-1)).sum(dim=1)
    total = routine_on(case.program, FP32, HERE).reduced(cells, case.weights)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


def test_what_no_kernel_knows_has_no_routine() -> None:
    unknown = Program(program().layout, True, False, None, lambda x: x[..., :96])
    assert routine_for(program(), FP32)
    assert not routine_for(unknown, FP32)
    assert not routine_for(program(), torch.float64)


def test_a_wrong_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    routine_for.cache_clear()
    right = cpu.LayerRoutine.__call__

    def wrong(self: cpu.LayerRoutine, hidden: Tensor, *rest: object) -> None:
        right(self, hidden.roll(1, dims=1), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu.LayerRoutine, "__call__", wrong)
    with caplog.at_level(logging.WARNING):
        assert routine_for(program(), FP32) is None
    assert "wrong results" in caplog.text
    routine_for.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("processor", [HERE, pytest.param(NARROW, marks=X86)], ids=["", "narrow"])
def test_dense_rows(dtype: torch.dtype, processor: Processor) -> None:
    """70 rows are no multiple of those that are multiplied together."""
    name = str(dtype).removeprefix("torch.")
    dots = dtype == BF16 and processor.dots
    random = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=random, dtype=FP32).to(dtype)
        for shape in ((3, 64), (70, 64), (70,))
    )
    one = []
    for tokens in (1, 3):
        for given in (None, bias):
            run = compiled_rows(RowsKernel(name, tokens, given is not None, dots), processor)
            out = x.new_empty(tokens, 70)
            places = (x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
            for threads in (1, 2):
                out.zero_()
                run((*places, 70, 64, threads))
                exact = linear(x[:tokens].double(), weight.double())
                exact += 0 if given is None else given.double()
                error = (out.double() - exact).abs().max()
                assert error <= (1e-5 if dtype == FP32 else 0.1)
                one.append(out[0].clone())
    assert all(torch.equal(a, b) for a, b in zip(one, one[4:], strict=False))
    assert torch.equal(one[0], one[1])
