"""How much worse a figure of quality may become.

Knows: which figures are held, their default tolerances and the reasons. Does not know: where they
are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

MORE_IS_BETTER = frozenset({"top1_agreement"})


@dataclass(frozen=True)
class Tolerance:
    """How much worse a figure may become."""

    relative: float = 0.0
    absolute: float = 0.0

    def limit(self, figure: str, before: float) -> float:
        """The worst that `figure` may be when it was `before`."""
        if figure == "perplexity_ratio":
            before = max(before, 1.0)  # below the reference's is luck, not something to keep
        allowed = self.absolute + self.relative * abs(before)
        return before - allowed if figure in MORE_IS_BETTER else before + allowed


# On one machine a check repeats to the last bit, so tolerances are for other processors and
# versions. What rounding alone does is bounded by the demo in bfloat16 against itself in float32:
# KL mean 0.0010, median 0.0007, 99% 0.006, max 0.02, 2.5% other top tokens, perplexity 0.04%
# (docs/log.md). The absolute parts are above that, and matter where a figure is near 0 as at 8
# and 16 bits; the relative parts are well below what a bit less costs.
TOLERANCES = {
    "kl_mean": Tolerance(relative=0.10, absolute=0.002),
    "kl_median": Tolerance(relative=0.15, absolute=0.002),
    # Set by a few positions: steadier than the maximum, less than the mean.
    "kl_p99": Tolerance(relative=0.30, absolute=0.02),
    # Set by one position; twice as far is a new kind of mistake.
    "kl_max": Tolerance(relative=1.00, absolute=0.05),
    "top1_agreement": Tolerance(absolute=0.03),
    # The perplexity itself is this times the reference's, which has to be the same.
    # llama.cpp's q4_K_M costs 2.8% on Llama 3 8B, its q8_0 0.04% (its perplexity README).
    "perplexity_ratio": Tolerance(relative=0.01),
}


@dataclass(frozen=True)
class Change:
    """A figure that may not be as it is: `now` is beyond `limit`, `before` is the baseline's."""

    figure: str
    before: float
    now: float
    limit: float

    @property
    def is_worse(self) -> bool:
        within = self.now >= self.limit if self.figure in MORE_IS_BETTER else self.now <= self.limit
        return not within  # so written, a NaN is worse

    def __str__(self) -> str:
        bound = "at least" if self.figure in MORE_IS_BETTER else "at most"
        now, limit, before = (f"{value:.4g}" for value in (self.now, self.limit, self.before))
        return f"{self.figure} {now} ({bound} {limit} allowed, was {before})"
