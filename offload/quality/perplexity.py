"""Perplexity of a model on a text.

Knows: its formula and its standard error. Does not know: windows (`offload.quality.scoring`),
printing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.errors import QualityError
from offload.quality.estimate import Estimate, exp_of, mean_of
from offload.quality.scoring import Sliding, Text, score

Report = Callable[[int, int], None]  # tokens scored, tokens to score


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` scored tokens."""

    nll: Estimate  # nats a token
    tokens: int

    @property
    def perplexity(self) -> Estimate:
        return exp_of(self.nll)

    def __str__(self) -> str:
        return f"Perplexity: {self.perplexity}"


def measure_perplexity(
    model: PreTrainedModel, text: Text, sliding: Sliding, report: Report | None = None
) -> Perplexity:
    """Perplexity of `model` on `text`; `report` is told how far it is.

    Error of the mean of the n log-likelihoods sqrt((E[x^2] - E[x]^2) / (n - 1)), times the
    perplexity: as llama.cpp's perplexity tool prints it. Raises `QualityError`.
    """
    samples: list[Tensor] = []
    done = 0
    for scores in score(model, text, sliding):
        samples.append(finite(scores.nll, done, "the negative log-likelihood"))
        done += len(samples[-1])
        if report is not None:
            report(done, text.scored)
    return Perplexity(mean_of(torch.cat(samples)), done)


def finite(values: Tensor, at: int, what: str) -> Tensor:
    """`values` [n] if all are finite; else `QualityError`. `at`: tokens scored before."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise QualityError(
            f"{what} at scored token {at + index + 1} is {float(values[index])}: weights are "
            "damaged or overflow in this dtype; remake the pack"
        )
    return values
