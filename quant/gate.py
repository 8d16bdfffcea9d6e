"""Activations that kernels know, and how one is recognised.

Knows: what each computes, in torch. Does not know: kernels, models' names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
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
