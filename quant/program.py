"""What an experts layer computes between the two matrices of a record.

Letters: S cells (a cell is one token at one of its experts), H hidden, I inner.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from offload.quant.record import MatrixLayout, RecordLayout

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
    """An activation that kernels know, named by what it computes.

    From gate g and up u it computes f(g) * u with f from `FUNCTIONS`, or f(g) if there is no up.
    `swiglu_oai`, which gpt-oss uses, is (u + 1) * g * sigmoid(alpha * g). A `limit` first clamps g
    from above and u from both sides.
    """

    name: str
    limit: float | None = None
    alpha: float = 1.0

    def __call__(self, x: Tensor, gated: bool, interleaved: bool) -> Tensor:
        """Compute [S, I] from x [S, 2I], or from x [S, I] if not `gated`.

        `interleaved` means that g and u alternate, column by column.
        """
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
    """The gate whose results on random inputs are those of `function`, or None.

    `numbers` are the candidates for `limit` and `alpha`. Results must also be equal in bfloat16,
    where intermediate roundings show.
    """
    random = torch.Generator().manual_seed(1)
    x = torch.randn(16, 32, generator=random, dtype=torch.float32) * 8
    try:
        expected = [function(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    except Exception:  # the function takes other arguments than an activation
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


@dataclass(frozen=True)
class Program:
    """One layer's experts: inner = gate(x @ up^T), out = inner @ down^T.

    The first matrix of the layout is [2I, H] where `gated`, else [I, H]; the second is [H, I].
    """

    layout: RecordLayout
    gated: bool
    interleaved: bool  # gate and up alternate, row by row; else up's rows follow gate's
    gate: Gate | None  # None if kernels do not know it: `apply` is then called between products
    # The model's own activation: [S, 2I] or [S, I] -> [S, I].
    apply: Callable[[Tensor], Tensor] = field(compare=False)

    @property
    def up(self) -> MatrixLayout:
        return self.layout.matrices[0]

    @property
    def down(self) -> MatrixLayout:
        return self.layout.matrices[1]
