"""One token's experts from slots: the seam to `quant.experts`.

Knows: which layer computes what, and whether kernels can. Does not know: who is in which slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.engine.compute import program_of
from offload.engine.layer import Layer
from offload.quant.experts import decode, kernels_work
from offload.quant.pack import PackInfo
from offload.quant.program import Program


class SlotDecode:
    """Computes one token's experts from slots, without asking the host anything."""

    def __init__(self, info: PackInfo) -> None:
        self._info = info
        self._programs: dict[int, Program] = {}

    def __call__(
        self, layer: Layer, hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, cells: Tensor
    ) -> None:
        """Fill `cells` [k, H] for `hidden` [1, H]; where `slot_of_cell` [k] is -1 they stay.

        What comes before a norm that some models have after each expert.
        """
        decode(hidden, slots, slot_of_cell, self._program(layer), cells)

    def works(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether there are kernels for this layer; the reference would ask for every slot."""
        return kernels_work(self._program(layer), dtype, device)

    def _program(self, layer: Layer) -> Program:
        if layer.index not in self._programs:
            layout = self._info.layout_of(layer.index)
            self._programs[layer.index] = program_of(layer.module, layout)
        return self._programs[layer.index]
