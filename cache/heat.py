"""How much each expert was used lately, for warm starts and heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.cache.policies import MOST, Key, growth_of

HALF_LIFE = 256.0  # tokens after which a use counts half: about a conversation
GROWTH = growth_of(HALF_LIFE)


@dataclass
class LayerHeat:
    """Decayed uses of one layer's experts."""

    unit: float = 1.0  # weight of a use made now
    uses: dict[int, float] = field(default_factory=dict)  # by expert


@dataclass
class Heat:
    """Decayed uses of every expert of every layer."""

    layers: list[LayerHeat]

    def use(self, layer: int, experts: Sequence[int], weight: float) -> None:
        """A step of `layer` asked for `experts`."""
        at = self.layers[layer]
        uses, unit = at.uses, at.unit * weight
        for expert in experts:
            uses[expert] = uses.get(expert, 0.0) + unit
        at.unit *= GROWTH
        if at.unit > MOST:
            for expert in uses:
                uses[expert] /= at.unit
            at.unit = 1.0

    def of(self, layer: int, expert: int) -> float:
        """Decayed uses of an expert."""
        at = self.layers[layer]
        return at.uses.get(expert, 0.0) / at.unit

    def hottest(self, most: int | None = None) -> list[Key]:
        """The experts that were used at all, at most `most` of them, the hottest first."""
        keys = [(layer, expert) for layer, at in enumerate(self.layers) for expert in at.uses]
        keys.sort(key=lambda key: (-self.of(*key), key))
        return keys[:most]

    def restore(self, layer: int, expert: int, uses: float) -> None:
        """Count `uses` from an earlier run."""
        at = self.layers[layer]
        at.uses[expert] = uses * at.unit

    def adopt(self, states: Sequence[LayerHeat]) -> None:
        """Go on from `states`, which has each layer's heat at some moment."""
        for at, state in zip(self.layers, states, strict=True):
            at.unit, at.uses = state.unit, dict(state.uses)
