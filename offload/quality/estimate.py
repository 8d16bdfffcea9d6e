"""A measured value with its standard error.

Knows: how errors of means and of their exponentials are computed. Does not know: what is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean_of(samples: Tensor) -> Estimate:
    """The mean of `samples` [n], n > 1: its error is sqrt((E[x^2] - E[x]^2) / (n - 1)).

    As llama.cpp's perplexity tool has it (`mean_and_uncertainty`): the samples count as
    independent, which neighbouring tokens are not quite.
    """
    values = samples.double()
    variance = float(values.var(correction=0))
    return Estimate(float(values.mean()), math.sqrt(variance / (len(values) - 1)))


def share_of(hits: Tensor) -> Estimate:
    """The share p of true `hits` [n], n > 1: its error is sqrt(p (1 - p) / (n - 1))."""
    share = float(hits.double().mean())
    return Estimate(share, math.sqrt(share * (1 - share) / (len(hits) - 1)))


def exp_of(estimate: Estimate) -> Estimate:
    """The exponential: |d exp(x) / dx| = exp(x) carries the error over (first order)."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf  # 1.8e308 is exp(709.8)
    return Estimate(value, value * estimate.error)
