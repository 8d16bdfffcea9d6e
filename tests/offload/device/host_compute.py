"""One token's experts by the products of the host-planned engine, without asking for a slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offload.layer import Layer
from quant.matmul import matmul
from quant.record import view_record


def decode(
    layer: Layer, hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, cells: Tensor
) -> None:
    module: Any = layer.module
    layout = layer.engine._info.layout_of(layer.index)
    function = module._apply_gate if module.has_gate else module.act_fn
    for cell in range(len(cells)):
        slot = slot_of_cell[cell : cell + 1]
        record = slots.index_select(0, slot.clamp(min=0))[0]
        up, down = view_record(record, layout).values()
        out = matmul(function(matmul(hidden, up)), down)
        cells[cell] = torch.where(slot >= 0, out[0], cells[cell])
