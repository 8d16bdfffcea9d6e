"""What an experts layer computes with the matrices of a record.

Knows: names and numbers. Does not know: tensors' places, kernels, models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from offload.quant.record import MatrixLayout, RecordLayout
from torch import Tensor
from torch.nn import functional

# S cells, I inner

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
OAI = "swiglu_oai"


@dataclass(frozen=True)
class Gate:
    """An activation, by what it computes.

    With gate g and up u, the two clamped where there is a `limit`, g from above and u from both
    sides: f(g) * u with f of `FUNCTIONS`, or f(g) alone where there is no up; `swiglu_oai` is
    (u + 1) * g * sigmoid(alpha * g), as in gpt-oss.
    """

    name: str
    limit: float | None = None
    alpha: float = 1.0

    def __call__(self, x: Tensor, gated: bool, interleaved: bool) -> Tensor:
        """x [S, 2I], or [S, I] where not `gated` -> [S, I]; `interleaved`: g and u in turns."""
        if not gated:
            return FUNCTIONS[self.name](x)
        gate, up = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.name == OAI:
            return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        return FUNCTIONS[self.name](gate) * up


def recognise(
    function: Callable[[Tensor], Tensor],
    gated: bool,
    interleaved: bool,
    numbers: Iterable[float] = (),
) -> Gate | None:
    """The gate that gives what `function` gives for random inputs, or None.

    `numbers`: what limits and factors may be. Equal in bfloat16, too: roundings on the way count.
    """
    random = torch.Generator().manual_seed(1)
    x = torch.randn(16, 32, generator=random, dtype=torch.float32) * 8
    try:
        expected = [function(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    except Exception:  # a function of a kind that nothing here is
        return None
    for gate in _candidates(gated, sorted({abs(float(n)) for n in numbers if 0 < abs(n) < 1e4})):
        if all(torch.equal(gate(x.to(e.dtype), gated, interleaved), e) for e in expected):
            return gate
    return None


def _candidates(gated: bool, numbers: list[float]) -> Iterator[Gate]:
    yield from (Gate(name) for name in FUNCTIONS)
    if gated:
        for limit in (None, *numbers):
            yield from (Gate(OAI, limit, alpha) for alpha in numbers)
        yield from (Gate(name, limit) for name, limit in itertools.product(FUNCTIONS, numbers))


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
