"""How far a model is from its reference, as figures.

Knows: the formulas, a table. Does not know: models, files, where the table goes.

P is the reference's distribution of the next token, Q the model's; n scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.quality.estimate import Estimate, exp_of, mean_of, share_of


@dataclass(frozen=True)
class Positions:
    """What is known of each scored position: all [n], on the CPU."""

    kl: Tensor  # KL(P || Q) in nats
    same_top: Tensor  # bool: P and Q have their maximum at the same token
    nll: Tensor  # of the text's token under Q
    reference_nll: Tensor  # under P

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """One after the other."""
        return cls(
            torch.cat([part.kl for part in parts]),
            torch.cat([part.same_top for part in parts]),
            torch.cat([part.nll for part in parts]),
            torch.cat([part.reference_nll for part in parts]),
        )


@dataclass(frozen=True)
class Comparison:
    """The figures of llama.cpp's `--kl-divergence`, by the same formulas."""

    tokens: int
    kl_mean: Estimate
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: Estimate  # share of positions with the same most probable token
    perplexity: Estimate
    reference_perplexity: Estimate
    ratio: Estimate  # the model's perplexity over the reference's

    @classmethod
    def of(cls, positions: Positions) -> Comparison:
        """The ratio's error is that of the mean difference of both log-likelihoods: as they are of
        the same tokens, most of what they vary is common and cancels."""
        kl = positions.kl.double()
        return cls(
            tokens=len(kl),
            kl_mean=mean_of(kl),
            kl_median=float(kl.quantile(0.5)),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            agreement=share_of(positions.same_top),
            perplexity=exp_of(mean_of(positions.nll)),
            reference_perplexity=exp_of(mean_of(positions.reference_nll)),
            ratio=exp_of(mean_of(positions.nll - positions.reference_nll)),
        )

    def figures(self) -> dict[str, float]:
        """The figures by name, errors left out."""
        return {
            "kl_mean": self.kl_mean.value,
            "kl_median": self.kl_median,
            "kl_p99": self.kl_p99,
            "kl_max": self.kl_max,
            "top1_agreement": self.agreement.value,
            "perplexity": self.perplexity.value,
            "perplexity_ratio": self.ratio.value,
            "reference_perplexity": self.reference_perplexity.value,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            **self.figures(),
            "kl_mean_error": self.kl_mean.error,
            "top1_agreement_error": self.agreement.error,
            "perplexity_error": self.perplexity.error,
            "perplexity_ratio_error": self.ratio.error,
            "reference_perplexity_error": self.reference_perplexity.error,
        }


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(P || Q) [n] in nats of log-probabilities `reference` and `model` [n, V].

    Never below 0: what rounding leaves there is not a distance.
    """
    terms = reference.exp() * (reference - model)
    terms = terms.where(reference.isfinite(), 0)  # p log p is 0 where p is
    return terms.sum(-1, dtype=torch.float64).clamp_min(0)


HEADINGS = ("prompt", "tokens", "KL mean", "median", "99%", "max", "same top", "ppl", "ratio")


def table(rows: Sequence[tuple[str, Comparison]]) -> str:
    """The figures as aligned lines; the last row, of all prompts, then with its errors."""
    cells = [HEADINGS, *(_cells(name, comparison) for name, comparison in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in pairs)
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in cells)
    ]
    total = rows[-1][1]
    return "\n".join(
        [
            *lines,
            "",
            f"KL(reference || model): {total.kl_mean.value:.6f} ± {total.kl_mean.error:.6f} nats",
            f"Same top token: {total.agreement.value:.2%} ± {total.agreement.error:.2%}",
            f"Perplexity: {total.perplexity}, of the reference {total.reference_perplexity}, "
            f"ratio {total.ratio.value:.4f} ± {total.ratio.error:.4f}",
        ]
    )


def _cells(name: str, comparison: Comparison) -> tuple[str, ...]:
    kl = (
        comparison.kl_mean.value,
        comparison.kl_median,
        comparison.kl_p99,
        comparison.kl_max,
    )
    return (
        name,
        str(comparison.tokens),
        *(f"{value:.4f}" for value in kl),
        f"{comparison.agreement.value:.1%}",
        f"{comparison.perplexity.value:.3f}",
        f"{comparison.ratio.value:.4f}",
    )
