"""Kernels of grouped experts agree with the reference, on a GPU or under Triton's interpreter.

Letters: T tokens, S cells, H hidden, I inner.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offload.quant import experts as module
from offload.quant.experts import (
    SMALLEST_BLOCK,
    decode,
    decode_reference,
    kernels_work,
    make_batch,
    prefill,
)
from offload.quant.kernels import gpu
from offload.quant.matmul import sample_record
from offload.quant.program import FUNCTIONS, OAI, Gate, Program, recognise
from offload.quant.record import MatrixSpec, plan_layout
from offload.quant.scheme import Scheme
from tests.interpreter import quicken

quicken()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEPT = 7.0  # what is in cells before


def program(
    scheme: Scheme,
    hidden: int = 64,
    inner: int = 32,
    *,
    gate: Gate = Gate("silu"),  # noqa: B008
    gated: bool = True,
    interleaved: bool = False,
    bias: bool = False,
    stored: torch.dtype = BF16,
) -> Program:
    up = MatrixSpec("up", inner * (1 + gated), hidden, bias, stored)
    down = MatrixSpec("down", hidden, inner, bias, stored)
    layout = plan_layout((up, down), scheme)
    return Program(layout, gated, interleaved, gate, lambda x: gate(x, gated, interleaved))


def slots_of(made: Program, count: int = 3) -> Tensor:
    return torch.stack([sample_record(made.layout, seed) for seed in range(count)]).to(DEVICE)


def tokens(made: Program, dtype: torch.dtype, count: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(count)
    shape = count, made.up.columns
    return (torch.randn(shape, generator=random, dtype=FP32) * 4).to(DEVICE, dtype)


def table(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def cells_like(made: Program, dtype: torch.dtype, count: int) -> Tensor:
    return torch.full((count, made.down.rows), KEPT, dtype=dtype, device=DEVICE)


def both_equal_the_reference(made: Program, dtype: torch.dtype) -> None:
    hidden, slots = tokens(made, dtype, 2), slots_of(made)
    expected, few, many = (cells_like(made, dtype, 4) for _ in range(3))
    decode_reference(hidden, slots, table(2, -1, -1, 0), made, expected)
    module.decode_kernels(hidden, slots, table(2, -1, -1, 0), made, few)
    batch = make_batch({2: [0], 0: [3]}, SMALLEST_BLOCK, DEVICE)
    module.prefill_kernels(hidden, slots, batch, made, many)
    filled = expected[[0, 3]].double()
    # The reference rounds each weight to the tokens' dtype; decode's kernels do not.
    allowed = 1e-5 if dtype == FP32 else 8 * torch.finfo(dtype).eps
    for got in (few, many):
        assert torch.equal(got[1:3], expected[1:3])
        close = {"rtol": allowed, "atol": allowed * float(filled.abs().max())}
        torch.testing.assert_close(got[[0, 3]].double(), filled, **close)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("group", "scale_bits"), [(16, 8), (32, 16)])
def test_every_format_gives_the_reference(bits: int, group: int, scale_bits: int) -> None:
    both_equal_the_reference(program(Scheme(bits, group, scale_bits)), FP32)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_dtype_gives_the_reference(bits: int, dtype: torch.dtype) -> None:
    both_equal_the_reference(program(Scheme(bits, 32), bias=True), dtype)


@pytest.mark.parametrize("group", [64, 128, 256])
def test_long_groups_give_the_reference(group: int) -> None:
    both_equal_the_reference(program(Scheme(4, group), 256, 256), FP32)


@pytest.mark.parametrize(
    ("hidden", "inner"), [(80, 16), (48, 112), (208, 48)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("bits", [4, 16])
def test_sizes_that_nothing_divides_give_the_reference(bits: int, hidden: int, inner: int) -> None:
    both_equal_the_reference(program(Scheme(bits, 64), hidden, inner, bias=True), FP32)


@pytest.mark.parametrize("stored", [FP32, FP16])
def test_matrices_kept_as_they_are_give_the_reference(stored: torch.dtype) -> None:
    both_equal_the_reference(program(Scheme(16), 72, 40, bias=True, stored=stored), FP32)


GATES = [*(Gate(name) for name in FUNCTIONS), Gate("silu", 0.5), Gate(OAI, 0.5, 1.702)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_gate_gives_the_reference(gate: Gate, interleaved: bool) -> None:
    both_equal_the_reference(program(Scheme(16), gate=gate, interleaved=interleaved), FP32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_experts_without_a_gate_give_the_reference(name: str) -> None:
    both_equal_the_reference(program(Scheme(16), gate=Gate(name), gated=False), BF16)


def test_gate_that_no_kernel_knows_is_called_between_two() -> None:
    made = program(Scheme(4, 32))
    strange = replace(
        made, gate=None, apply=lambda x: torch.sin(x[..., 0::2]) * torch.exp(x[..., 1::2].neg())
    )
    both_equal_the_reference(strange, FP32)


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gates_are_recognised_by_what_they_compute(gate: Gate, interleaved: bool) -> None:
    numbers = [7.0, 0.5, 1.702]
    found = recognise(lambda x: gate(x, True, interleaved), True, interleaved, numbers)
    assert found == gate


def test_what_rounds_otherwise_is_not_recognised() -> None:
    def in_float32(x: Tensor) -> Tensor:
        return Gate("silu")(x.float(), True, False).to(x.dtype)

    assert recognise(in_float32, True, False) is None
    assert recognise(lambda x: x, True, False) is None


def test_results_do_not_depend_on_slots_nor_on_other_cells() -> None:
    made = program(Scheme(4, 32), bias=True)
    hidden, slots = tokens(made, BF16, 2), slots_of(made)
    together, alone, moved = (cells_like(made, BF16, 4) for _ in range(3))
    module.decode_kernels(hidden, slots, table(2, 1, 0, 2), made, together)
    for cell, slot in enumerate((2, 1, 0, 2)):
        one = [-1] * 4
        one[cell] = slot
        module.decode_kernels(hidden, slots, table(*one), made, alone)
    module.decode_kernels(hidden, slots.flip(0).contiguous(), table(0, 1, 2, 0), made, moved)
    assert torch.equal(alone, together)
    assert torch.equal(moved, together)


def test_blocks_of_cells_do_not_show() -> None:
    made = program(Scheme(4, 32))
    hidden, slots = tokens(made, BF16, 20), slots_of(made, 2)
    whole, parts = cells_like(made, BF16, 20), cells_like(made, BF16, 20)
    ways: dict[int, list[int]] = {0: list(range(17)), 1: [19, 17]}
    module.prefill_kernels(hidden, slots, make_batch(ways, 16, DEVICE), made, whole)
    for slot, some in ((1, [17]), (0, [16, 2, 3]), (0, [*range(4, 16), 0, 1]), (1, [19])):
        module.prefill_kernels(hidden, slots, make_batch({slot: some}, 16, DEVICE), made, parts)
    assert torch.equal(parts, whole)
    assert bool((whole[18] == KEPT).all())


def test_parts_of_a_long_row_are_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "splits", lambda *_: 2)
    both_equal_the_reference(program(Scheme(4, 16), 256, 32, bias=True), FP32)


def test_references_are_the_way_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kernels_work", lambda *_: False)
    made = program(Scheme(3, 16))
    hidden, slots = tokens(made, FP32, 2), slots_of(made)
    expected, few, many = (cells_like(made, FP32, 4) for _ in range(3))
    decode_reference(hidden, slots, table(0, 1, 2, 0), made, expected)
    decode(hidden, slots, table(0, 1, 2, 0), made, few)
    prefill(hidden, slots, make_batch({0: [0, 3], 1: [1], 2: [2]}, 16, DEVICE), made, many)
    assert torch.equal(few, expected)
    torch.testing.assert_close(many, expected)


def test_kernels_that_give_the_reference_are_used_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = program(Scheme(4, 32))
    assert kernels_work(made, BF16, DEVICE)
    assert not kernels_work(made, torch.float64, DEVICE)
    right = module.decode_kernels

    def wrong(hidden: Tensor, slots: Tensor, where: Tensor, made: Program, cells: Tensor) -> None:
        right(hidden, slots, where, made, cells)
        cells += 1

    def broken(*_: object) -> None:
        raise RuntimeError("no such target\nsm_0")

    for way, word in ((wrong, "wrong results"), (broken, "RuntimeError: no such target sm_0")):
        kernels_work.cache_clear()
        monkeypatch.setattr(module, "decode_kernels", way)
        with caplog.at_level(logging.WARNING):
            assert not kernels_work(made, BF16, DEVICE)
        assert word in caplog.messages[-1]
    kernels_work.cache_clear()


def test_more_cells_than_a_grids_second_dimension_has_are_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids: list[tuple[int, ...]] = []

    class Caught:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(gpu, "gate_rows", Caught())
    cells = 1 << 17
    order = torch.empty(cells, dtype=torch.int32, device="meta")
    raw, inner = torch.empty(cells, 64, device="meta"), torch.empty(cells, 32, device="meta")
    gpu.activate(raw, order, gpu.Gated(Gate("silu"), True), inner)
    ((first, *others),) = grids
    assert first == cells
    assert max(others) < 1 << 16
