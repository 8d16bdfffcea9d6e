"""Computes all experts of a layer at once, from records in expert slots.

The reference runs on any device. The GPU's kernels have the same signatures, and are used where
they give the same results.

Letters: T tokens, k experts a token, S = T * k cells (a cell is one token at one of its experts;
cell // k is the token), H hidden, I inner, C cells of a batch, B blocks.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.quant.kernels import cpu
from offload.quant.matmul import (
    KERNEL_DTYPES,
    Matmul,
    gpu_kernels,
    kernel_agrees,
    launching_on,
    matmul,
    matmul_reference,
    sample_record,
)
from offload.quant.program import Program
from offload.quant.record import view_record

logger = logging.getLogger(__name__)

Routine = cpu.LayerRoutine

# In one call on the CPU each token reads its experts for itself; with more, sharing is quicker.
MOST_IN_ONE_CALL = 8
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 64  # cells that share one read of a tile of weights


@dataclass(frozen=True)
class Batch:
    """Cells sorted by expert slot, in blocks of at most `block_cells`."""

    order: Tensor  # [C] int32 numbers of cells
    blocks: Tensor  # [B, 3] int32: slot, first and end in `order`
    block_cells: int


def block_cells(cells: int, experts: int) -> int:
    """How many cells of one expert are computed together in a call of `cells` over `experts`.

    Pass totals for the whole call and layer, never for one wave: block size affects rounding, and
    rounding must not depend on which experts were resident.
    """
    size = SMALLEST_BLOCK
    while size < LARGEST_BLOCK and size * experts < cells:
        size *= 2
    return size


def make_batch(
    cells_of_slot: Mapping[int, Sequence[int]], size: int, device: torch.device
) -> Batch:
    """A batch of the cells of each expert slot, in blocks of at most `size` cells."""
    order: list[int] = []
    blocks: list[tuple[int, int, int]] = []
    for slot, cells in cells_of_slot.items():
        first, end = len(order), len(order) + len(cells)
        order.extend(cells)
        blocks.extend((slot, at, min(at + size, end)) for at in range(first, end, size))
    return Batch(
        torch.tensor(order, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor(blocks, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True),
        size,
    )


def decode(
    hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, program: Program, cells: Tensor
) -> None:
    """Fill `cells` [S, H] with what the experts make of a few tokens `hidden` [T, H].

    Each of `slots` [n, slot_bytes] uint8 begins with a record. Cells whose entry in `slot_of_cell`
    [S] int32 is negative stay as they are. A cell's result depends only on its token and its
    record. The host does not wait for the device.
    """
    way = decode_kernels if kernels_work(program, hidden.dtype, slots.device) else decode_reference
    way(hidden, slots, slot_of_cell, program, cells)


@functools.cache
def routine_for(program: Program, dtype: torch.dtype) -> Routine | None:
    """The routine that computes a few tokens' experts on the CPU; None if there is none.

    It has to compile here and to agree with the reference. Its results do not depend on how many
    tokens there are; with more than MOST_IN_ONE_CALL another way is quicker.
    """
    if not cpu.knows_layer(program, dtype):
        return None
    records = [sample_record(program.layout, seed) for seed in (1, 2)]
    hidden = _sample_tokens(program, dtype)
    got, expected = (hidden.new_zeros(3, program.down.rows) for _ in range(2))
    where = torch.tensor([1, 0, -1], dtype=torch.int32)
    decode_reference(hidden, torch.stack(records), where, program, expected, matmul_reference)

    def compute() -> Tensor:
        routine = Routine(cpu.layer_code(program, dtype), program)
        routine(hidden, [records[n].data_ptr() for n in (1, 0)], [0, 1], got)
        return got

    works = _agrees("CPU kernel for a layer", compute, expected)
    return Routine(cpu.layer_code(program, dtype), program) if works else None


def _sample_tokens(program: Program, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(3, program.up.columns, generator=random, dtype=torch.float32).to(dtype)


def _agrees(kernel: str, compute: Callable[[], Tensor], expected: Tensor) -> bool:
    exact = expected.float()
    atol = 0.05 * float(exact.abs().max())
    return kernel_agrees("experts", kernel, compute, exact, rtol=0.05, atol=atol)


def prefill(hidden: Tensor, slots: Tensor, batch: Batch, program: Program, cells: Tensor) -> None:
    """Fill the cells in `batch` as `decode` would, in a way that is quicker for many tokens."""
    works = kernels_work(program, hidden.dtype, slots.device)
    way = prefill_kernels if works else prefill_reference
    way(hidden, slots, batch, program, cells)


def decode_reference(
    hidden: Tensor,
    slots: Tensor,
    slot_of_cell: Tensor,
    program: Program,
    cells: Tensor,
    product: Matmul = matmul,
) -> None:
    """Do what `decode` does on any device, cell by cell, with `product` for each product."""
    k = len(cells) // len(hidden)
    for cell, slot in enumerate(slot_of_cell.tolist()):  # sync: the host walks the cells
        if slot >= 0:
            token = cell // k
            cells[cell] = _expert(hidden[token : token + 1], slots[slot], program, product)[0]


def prefill_reference(
    hidden: Tensor, slots: Tensor, batch: Batch, program: Program, cells: Tensor
) -> None:
    """Do what `prefill` does on any device, block by block."""
    k = len(cells) // len(hidden)
    for slot, first, end in batch.blocks.tolist():  # sync: the host walks the cells
        where = batch.order[first:end].long()
        cells[where] = _expert(hidden[where // k], slots[slot], program, matmul)


def _expert(x: Tensor, record: Tensor, program: Program, product: Matmul) -> Tensor:
    views = view_record(record, program.layout)
    inner = program.apply(product(x, views[program.up.name]))
    return product(inner, views[program.down.name])


def decode_kernels(
    hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, program: Program, cells: Tensor
) -> None:
    """Do what `decode` does, with the GPU's kernels."""
    gpu = gpu_kernels(slots.device)
    assert gpu is not None
    tokens = len(hidden)
    raw = hidden.new_empty(len(cells), program.up.rows)  # [S, 2I]
    with launching_on(slots.device):
        gpu.gemv(hidden, slots, slot_of_cell, program.up, raw, tokens=tokens)
        if program.gate is None:
            inner, gated = program.apply(raw), gpu.AS_THEY_ARE
        else:
            inner, gated = raw, gpu.Gated(program.gate, program.gated, program.interleaved)
        gpu.gemv(inner, slots, slot_of_cell, program.down, cells, tokens=tokens, gated=gated)


def prefill_kernels(
    hidden: Tensor, slots: Tensor, batch: Batch, program: Program, cells: Tensor
) -> None:
    """Do what `prefill` does, with the GPU's kernels."""
    gpu = gpu_kernels(slots.device)
    assert gpu is not None
    raw = hidden.new_empty(len(cells), program.up.rows)  # [S, 2I]
    blocks = (slots, batch.blocks, batch.order, batch.block_cells)
    with launching_on(slots.device):
        gpu.gemm(hidden, *blocks, program.up, raw)
        if program.gate is None:
            inner = program.apply(raw)
        else:
            inner = hidden.new_empty(len(cells), program.down.columns)  # [S, I]
            gated = gpu.Gated(program.gate, program.gated, program.interleaved)
            gpu.activate(raw, batch.order, gated, inner)
        gpu.gemm(inner, *blocks, program.down, cells)


@functools.cache
def kernels_work(program: Program, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels for `program` compile here and agree with the reference.

    The kernels for decode and for prefill are both tried on records of random codes.
    """
    if dtype not in KERNEL_DTYPES or gpu_kernels(device) is None:
        return False
    slots = torch.stack([sample_record(program.layout, seed) for seed in (1, 2)]).to(device)
    hidden = _sample_tokens(program, dtype).to(device)
    where = torch.tensor([1, 0, -1], dtype=torch.int32, device=device)
    batch = make_batch({1: [0], 0: [1]}, SMALLEST_BLOCK, device)
    expected = hidden.new_zeros(3, program.down.rows)
    decode_reference(hidden, slots, where, program, expected, matmul_reference)
    few = functools.partial(decode_kernels, hidden, slots, where, program)
    many = functools.partial(prefill_kernels, hidden, slots, batch, program)

    def filled(way: Callable[[Tensor], None]) -> Tensor:
        got = torch.zeros_like(expected)
        way(got)
        return got

    return all(
        _agrees(f"GPU kernel for {name}", functools.partial(filled, way), expected)
        for name, way in (("decode", few), ("prefill", many))
    )
