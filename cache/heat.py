"""How much each expert was used lately, for warm starts and heat maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from offload.cache.decision import HeatState
from offload.cache.policies import Key

HALF_LIFE = 256.0  # tokens after which a use counts half: about a conversation
GROWTH = 2.0 ** (1.0 / HALF_LIFE)
MOST = 2.0**400  # a use may count as much before all uses of its layer are scaled down


@dataclass
class _LayerHeat:
    uses: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    unit: float = 1.0  # what a use counts now


class Heat:
    """Decayed uses of every expert of every layer."""

    def __init__(self, layers: int) -> None:
        self._layers = [_LayerHeat() for _ in range(layers)]

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """One view of the layers of all `parts`, which go on counting for both."""
        whole = cls(0)
        whole._layers = [layer for part in parts for layer in part._layers]
        return whole

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    def use(self, layer: int, experts: Sequence[int], weight: float) -> None:
        """A step of `layer` asked for `experts`."""
        at = self._layers[layer]
        uses, unit = at.uses, at.unit * weight
        for expert in experts:
            uses[expert] += unit
        at.unit *= GROWTH
        if at.unit > MOST:
            for expert in uses:
                uses[expert] /= at.unit
            at.unit = 1.0

    def of(self, layer: int, expert: int) -> float:
        """Decayed uses of an expert."""
        at = self._layers[layer]
        return at.uses.get(expert, 0.0) / at.unit

    def hottest(self, most: int | None = None) -> list[Key]:
        """The experts that were used at all, at most `most` of them, the hottest first."""
        keys = [(layer, expert) for layer, at in enumerate(self._layers) for expert in at.uses]
        keys.sort(key=lambda key: (-self.of(*key), key))
        return keys[:most]

    def restore(self, layer: int, expert: int, uses: float) -> None:
        """Count `uses` from an earlier run."""
        at = self._layers[layer]
        at.uses[expert] = uses * at.unit

    def states(self) -> tuple[HeatState, ...]:
        """Everything that is known, a layer after the other."""
        return tuple(HeatState(at.unit, dict(at.uses)) for at in self._layers)

    def adopt(self, states: Sequence[HeatState]) -> None:
        """Go on from `states`."""
        for at, state in zip(self._layers, states, strict=True):
            at.unit, at.uses = state.unit, defaultdict(float, state.uses)
