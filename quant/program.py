"""What an experts layer computes with the matrices of a record.

Knows: names and numbers. Does not know: tensors' places, kernels, models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from offload.quant.gate import Gate
from offload.quant.record import MatrixLayout, RecordLayout
from torch import Tensor

# Letters: S cells, I inner


@dataclass(frozen=True)
class Program:
    """One layer's experts: inner = gate(x @ up^T), out = inner @ down^T.

    The first matrix of the layout is [2I, H] where `gated`, else [I, H]; the second is [H, I].
    """

    layout: RecordLayout
    gated: bool
    interleaved: bool  # gate and up in turns, row by row, instead of one after the other
    gate: Gate | None  # None: kernels do not know it, `apply` is called between them
    # The model's own: [S, 2I] or [S, I] -> [S, I].
    apply: Callable[[Tensor], Tensor] = field(compare=False)

    @property
    def up(self) -> MatrixLayout:
        return self.layout.matrices[0]

    @property
    def down(self) -> MatrixLayout:
        return self.layout.matrices[1]
