"""How it is decided who is resident: the options about the cache, complete and checked.

Knows: their names and what follows from them. Does not know: memory, models, how anything is
decided (`cache`).
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.cache.allocation import ALLOCATIONS
from offload.cache.cache import ExpertCache
from offload.cache.guesses import MOST_AHEAD, NO_LOOKAHEAD, PREDICTORS, Lookahead, LookaheadBalance
from offload.cache.policies import POLICIES
from offload.errors import UnsupportedModelError

POLICY, ALLOCATION, PREDICTOR = "lfru", "shared", "router"  # chosen in docs/log.md


@dataclass(frozen=True)
class Residency:
    """Policy, allocation, look-ahead and warm start. Raises `UnsupportedModelError` for names that
    are none."""

    policy: str = POLICY
    allocation: str = ALLOCATION
    lookahead: bool | None = None  # None: while it pays; on the device as True
    predictor: str = PREDICTOR
    layers_ahead: int = 1
    warm_start: bool = True

    def __post_init__(self) -> None:
        for what, name, known in (
            ("policy", self.policy, POLICIES),
            ("allocation", self.allocation, ALLOCATIONS),
            ("predictor", self.predictor, PREDICTORS),
        ):
            if name not in known:
                names = " or ".join(known)
                raise UnsupportedModelError(f"there is no {what} {name!r}: choose {names}")
        if not 1 <= self.layers_ahead <= MOST_AHEAD:
            raise UnsupportedModelError(
                f"cannot look {self.layers_ahead} layers ahead: choose 1 to {MOST_AHEAD}"
            )

    def cache(self, slots: int, layers: int) -> ExpertCache:
        return ExpertCache(slots, layers, POLICIES[self.policy], self.allocation)

    def balance(self) -> LookaheadBalance | None:
        """What stops looking ahead while it does not pay, where the host plans; None: nothing."""
        return LookaheadBalance() if self.lookahead is None else None

    def ahead(self, everything_fits: bool) -> Lookahead:
        """Where everything fits nothing is ever loaded twice: no look-ahead."""
        if self.lookahead is False or everything_fits:
            return NO_LOOKAHEAD
        return Lookahead(self.predictor, self.layers_ahead)
