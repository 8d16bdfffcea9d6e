"""What a trace shows of a model's routing.

Knows: how to count choices, repetitions and distances. Does not know: caches (`cache.replay`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp, log

from offload.cache.trace.trace import Event, Trace


@dataclass
class LayerShape:
    """How one layer's choices are spread over generated tokens."""

    tokens: int = 0
    chosen: Counter[int] = field(default_factory=Counter)
    repeated: int = 0  # choices that the token before made too
    distances: Counter[int] = field(default_factory=Counter)  # experts used since, 0: the latest
    guessed: Counter[int] = field(default_factory=Counter)  # layers ahead -> experts guessed
    right: Counter[int] = field(default_factory=Counter)  # layers ahead -> of these, asked for
    asked: Counter[int] = field(default_factory=Counter)  # layers ahead -> choices that had a guess

    @property
    def choices(self) -> int:
        return self.chosen.total()

    @property
    def effective_experts(self) -> float:
        """Experts a uniform choice of the same entropy would have."""
        total = self.choices
        return exp(-sum(n / total * log(n / total) for n in self.chosen.values())) if total else 0.0

    @property
    def locality(self) -> float:
        """Share of choices that repeat the token before."""
        return self.repeated / self.choices if self.choices else 0.0

    def hits_within(self, experts: int) -> float:
        """Share of choices an LRU of so many slots for this layer alone would have held."""
        held = sum(n for distance, n in self.distances.items() if distance < experts)
        return held / self.choices if self.choices else 0.0


def shapes(trace: Trace) -> list[LayerShape]:
    """One for each layer, of generated tokens only."""
    layers = [LayerShape() for _ in range(trace.header.layers)]
    recent: list[list[int]] = [[] for _ in layers]  # experts by last use, the latest last
    before: list[frozenset[int]] = [frozenset()] * len(layers)
    said: dict[tuple[int, int], frozenset[int]] = {}  # (layer, layers ahead) -> experts
    for event in trace.events:
        if event.prompt:
            continue
        shape = layers[event.layer]
        for row in event.experts:
            shape.tokens += 1
            shape.chosen.update(row)
            shape.repeated += len(before[event.layer].intersection(row))
            before[event.layer] = frozenset(row)
            _measure(shape, recent[event.layer], row)
        _compare(shape, event, said)
    return layers


def _measure(shape: LayerShape, recent: list[int], row: Iterable[int]) -> None:
    places = {expert: at for at, expert in enumerate(reversed(recent))}
    for expert in row:
        if expert in places:
            shape.distances[places[expert]] += 1
            recent.remove(expert)
        recent.append(expert)


def _compare(shape: LayerShape, event: Event, said: dict[tuple[int, int], frozenset[int]]) -> None:
    """Hold what was guessed for this layer against what it asks for; note what is guessed now."""
    asked = {expert for row in event.experts for expert in row}
    for (layer, ahead), experts in list(said.items()):
        if layer == event.layer:
            shape.guessed[ahead] += len(experts)
            shape.right[ahead] += len(experts & asked)
            shape.asked[ahead] += len(asked)
            del said[layer, ahead]
    for guess in event.guesses:
        said[guess.layer, guess.layer - event.layer] = frozenset(guess.experts)


def total(layers: Iterable[LayerShape]) -> LayerShape:
    """All layers together; `chosen` then has no meaning of its own."""
    sum_of = LayerShape()
    for shape in layers:
        sum_of.tokens += shape.tokens
        sum_of.repeated += shape.repeated
        for name in ("chosen", "distances", "guessed", "right", "asked"):
            getattr(sum_of, name).update(getattr(shape, name))
    return sum_of
