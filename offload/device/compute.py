"""One token's experts from slots: the seam to `quant`.

Knows: which layer computes what. Does not know: who is in which slot, when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offload.layer import Layer
from quant.matmul import matmul
from quant.pack import PackInfo
from quant.record import view_record


class SlotDecode:
    """Cell by cell, with the products every device has; the slot is never asked for."""

    def __init__(self, info: PackInfo) -> None:
        self._info = info

    def __call__(
        self, layer: Layer, hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, cells: Tensor
    ) -> None:
        module: Any = layer.module
        layout = self._info.layout_of(layer.index)
        function = module._apply_gate if module.has_gate else module.act_fn
        for cell in range(len(cells)):
            slot = slot_of_cell[cell : cell + 1]
            record = slots.index_select(0, slot.clamp(min=0))[0]
            up, down = view_record(record, layout).values()
            out = matmul(function(matmul(hidden, up)), down)
            cells[cell] = torch.where(slot >= 0, out[0], cells[cell])
