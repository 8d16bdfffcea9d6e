"""How much each expert was used lately: what a warm start loads and a heat map shows.

Knows: uses that count half as much every `HALF_LIFE` steps. Does not know: who is resident.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from cache.policy import Key
from cache.state import HeatState

HALF_LIFE = 256.0  # tokens: a conversation, not a sentence
GROWTH = 2.0 ** (1.0 / HALF_LIFE)
MOST = 2.0**400


class Heat:
    """Decayed uses of every expert of every layer."""

    def __init__(self, layers: int) -> None:
        self._uses = [defaultdict[int, float](float) for _ in range(layers)]
        self._unit = [1.0] * layers  # what a use of the layer counts now

    def __len__(self) -> int:
        """Layers."""
        return len(self._uses)

    def use(self, layer: int, experts: Sequence[int], weight: float) -> None:
        """A step of `layer` asked for `experts`."""
        uses = self._uses[layer]
        unit = self._unit[layer] * weight
        for expert in experts:
            uses[expert] += unit
        self._unit[layer] *= GROWTH
        if self._unit[layer] > MOST:
            for expert in uses:
                uses[expert] /= self._unit[layer]
            self._unit[layer] = 1.0

    def of(self, layer: int, expert: int) -> float:
        """Decayed uses of an expert."""
        return self._uses[layer].get(expert, 0.0) / self._unit[layer]

    def hottest(self, most: int | None = None) -> list[Key]:
        """At most `most` experts that were used at all, the hottest first."""
        keys = [(layer, expert) for layer, uses in enumerate(self._uses) for expert in uses]
        keys.sort(key=lambda key: (-self.of(*key), key))
        return keys[:most]

    def restore(self, layer: int, expert: int, uses: float) -> None:
        """Count `uses` from an earlier run."""
        self._uses[layer][expert] = uses * self._unit[layer]

    def states(self) -> tuple[HeatState, ...]:
        """Everything that is known, a layer after the other."""
        known = zip(self._unit, self._uses, strict=True)
        return tuple(HeatState(unit, dict(uses)) for unit, uses in known)

    def adopt(self, states: Sequence[HeatState]) -> None:
        """Go on from `states`."""
        self._unit = [state.unit for state in states]
        self._uses = [defaultdict(float, state.uses) for state in states]
