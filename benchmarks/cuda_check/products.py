"""One shape's kernels, ready to be called.

Knows: how `quant.experts` is called. Does not know: what is timed (`kernels`), who compiles
(`compiling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cuda_check.attempt import NotBuiltError
from benchmarks.cuda_check.shapes import Case
from benchmarks.synthetic_packs import first_layer, random_record
from offload.engine.layer import program_of
from offload.quant import experts
from offload.quant.experts import Batch
from offload.quant.program import Program
from offload.quant.record import RecordLayout
from offload.quant.scheme import Scheme


@dataclass(frozen=True)
class Products:
    """The experts of one layer of `case`, in `slots` that all hold equal bytes."""

    case: Case
    layout: RecordLayout
    slots: Tensor  # [n, record_bytes] uint8
    program: Program

    def decode(self, hidden: Tensor, table: Tensor, cells: Tensor) -> None:
        """`hidden` [T, H] by the slots in `table` [T * k] into `cells` [T * k, H]."""
        experts.decode(hidden, self.slots, table, self.program, cells)

    def batch(self, tokens: int, slots: int) -> Batch:
        """The cells of a prompt in which every expert has as many tokens, spread over `slots`."""
        cells = tokens * self.case.top_k
        cells_of = {slot: list(range(slot, cells, slots)) for slot in range(slots)}
        size = experts.block_cells(cells, self.case.experts)
        return experts.make_batch(cells_of, size, self.slots.device)

    def prefill(self, hidden: Tensor, batch: Batch, cells: Tensor) -> None:
        """`hidden` [T, H] by the experts in `batch` into `cells` [T * k, H]."""
        experts.prefill(hidden, self.slots, batch, self.program, cells)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Random hidden states [T, H] and empty cells [T * k, H]."""
        device = self.slots.device
        hidden = torch.randn(tokens, self.program.up.columns, device=device).bfloat16()
        return hidden, hidden.new_zeros(tokens * self.case.top_k, self.program.down.rows)


def make_products(
    case: Case, scheme: str, device: torch.device, slots: int, ring_bytes: int, *, rehearse: bool
) -> Products:
    """At least `slots` of them, and as many as fill `ring_bytes`. Raises `NotBuiltError`."""
    module, layout = first_layer(case.config_of(1, rehearse), Scheme.parse(scheme))
    program = program_of(module, layout)
    if not experts.kernels_work(program, torch.bfloat16, device):
        raise NotBuiltError("its kernels are not used here: a warning said why")
    record = random_record(layout, torch.Generator().manual_seed(1)).to(device)
    count = max(slots, ring_bytes // layout.record_bytes)
    return Products(case, layout, record.repeat(count, 1), program)
