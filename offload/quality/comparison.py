"""The figures of a model beside its reference, from their log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.quality.scoring import Estimate, exp_of, mean_of


@dataclass(frozen=True)
class Positions:
    """Both models at each scored position; all tensors are [n], on the CPU."""

    kl: Tensor  # KL(P || Q) in nats, of the reference's distribution P and the model's Q
    same_top: Tensor  # bool: P and Q have their maximum at the same token
    nll: Tensor  # negative log-likelihood of the text's token under Q, in nats
    reference_nll: Tensor  # the same under P

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """Concatenate `parts`."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Comparison:
    """The figures of llama.cpp's `--kl-divergence`, computed by the same formulas."""

    tokens: int
    kl_mean: Estimate
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: Estimate  # share of positions with the same most probable token
    perplexity: Estimate
    perplexity_ratio: Estimate  # the model's perplexity over the reference's
    reference_perplexity: Estimate

    @classmethod
    def of(cls, positions: Positions) -> Comparison:
        """Compute the figures.

        The error of the perplexity ratio comes from the differences of the two log-likelihoods:
        both vary from token to token, but mostly together, so their difference varies little.
        """
        kl = positions.kl.double()
        return cls(
            tokens=len(kl),
            kl_mean=mean_of(kl),
            kl_median=float(kl.quantile(0.5)),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            top1_agreement=mean_of(positions.same_top),
            perplexity=exp_of(mean_of(positions.nll)),
            perplexity_ratio=exp_of(mean_of(positions.nll - positions.reference_nll)),
            reference_perplexity=exp_of(mean_of(positions.reference_nll)),
        )

    def figures(self) -> dict[str, float]:
        """Every figure by its name, without the standard errors."""
        return {
            name: value.value if isinstance(value, Estimate) else value
            for name, value in vars(self).items()
            if name != "tokens"
        }

    def to_json(self) -> dict[str, Any]:
        """All fields in one flat object; the standard error of `x` is called `x_error`."""
        errors = {
            f"{name}_error": value.error
            for name, value in vars(self).items()
            if isinstance(value, Estimate)
        }
        return {"tokens": self.tokens, **self.figures(), **errors}


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(P || Q) [n] in nats, of the log-probabilities `reference` (P) and `model` (Q), [n, V].

    A result below 0 is due to rounding and becomes 0.
    """
    terms = reference.exp() * (reference - model)
    terms = terms.where(reference.isfinite(), 0)  # p log p is 0 for p = 0
    return terms.sum(-1, dtype=torch.float64).clamp_min(0)


HEADINGS = ("prompt", "tokens", "KL mean", "median", "99%", "max", "same top", "ppl", "ratio")


def table(rows: Sequence[tuple[str, Comparison]]) -> str:
    """Format named comparisons as an aligned table.

    The last row, which stands for all prompts, is repeated below the table with standard errors.
    """
    cells = [HEADINGS, *(_cells(name, comparison) for name, comparison in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    total = rows[-1][1]
    return "\n".join(
        [
            *lines,
            "",
            f"KL(reference || model): {total.kl_mean.value:.6f} ± {total.kl_mean.error:.6f} nats",
            f"Same top token: {total.top1_agreement.value:.2%} ± {total.top1_agreement.error:.2%}",
            f"Perplexity: {total.perplexity}, of the reference {total.reference_perplexity}, "
            f"ratio {total.perplexity_ratio.value:.4f} ± {total.perplexity_ratio.error:.4f}",
        ]
    )


def _cells(name: str, comparison: Comparison) -> tuple[str, ...]:
    kl = (comparison.kl_mean.value, comparison.kl_median, comparison.kl_p99, comparison.kl_max)
    return (
        name,
        str(comparison.tokens),
        *(f"{value:.4f}" for value in kl),
        f"{comparison.top1_agreement.value:.1%}",
        f"{comparison.perplexity.value:.3f}",
        f"{comparison.perplexity_ratio.value:.4f}",
    )
