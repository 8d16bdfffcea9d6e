"""What a trace shows of a model's routing: choices, repetitions and distances."""

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
    repeated: int = 0  # choices that the token before had made too
    distances: Counter[int] = field(default_factory=Counter)  # experts chosen since -> choices
    # By the number of layers ahead: experts guessed, guesses that came true, choices with a guess.
    guessed: Counter[int] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)
    asked: Counter[int] = field(default_factory=Counter)

    @property
    def choices(self) -> int:
        return self.chosen.total()

    @property
    def effective_experts(self) -> float:
        """The number of experts among which a uniform choice has the same entropy."""
        total = self.choices
        return exp(-sum(n / total * log(n / total) for n in self.chosen.values())) if total else 0.0

    @property
    def locality(self) -> float:
        """Share of choices that repeat the token before."""
        return self.repeated / self.choices if self.choices else 0.0

    def hits_within(self, experts: int) -> float:
        """Share of choices that an LRU of `experts` slots for this layer alone would have held."""
        held = sum(n for distance, n in self.distances.items() if distance < experts)
        return held / self.choices if self.choices else 0.0


def shapes(trace: Trace) -> list[LayerShape]:
    """The routing of each layer over the generated tokens; prompts are left out."""
    layers = [LayerShape() for _ in range(trace.header.layers)]
    recent: list[list[int]] = [[] for _ in layers]  # experts, the latest used last
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
    """Compare the guesses for this layer with what it asks for, and note the guesses made now."""
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
    """All layers added up; `chosen` then mixes the experts of different layers."""
    sum_of = LayerShape()
    for shape in layers:
        sum_of.tokens += shape.tokens
        sum_of.repeated += shape.repeated
        for name in ("chosen", "distances", "guessed", "right", "asked"):
            getattr(sum_of, name).update(getattr(shape, name))
    return sum_of
