"""What the routers of a model chose, call by call, as values, and what their choices show.

Letters: T tokens of a call, k experts of a token.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import NamedTuple

from offload.cache.statistics import Figures


class CacheError(ValueError):
    """A name or a number that cannot be used; the message ends with the remedy."""


class TraceError(CacheError):
    """A file is not a trace, or is damaged."""


Setting = str | int | float | bool | None
Guessed = dict[int, dict[int, frozenset[int]]]  # layer -> layers ahead when guessed -> experts


class Guess(NamedTuple):
    """Experts that a router named ahead for the next step of its layer, likeliest first."""

    layer: int
    experts: tuple[int, ...]
    live: bool = True  # True: the cache was told and may have loaded them; False: only noted


class Event(NamedTuple):
    """One call of one MoE layer, and what changed the residents before it."""

    layer: int
    prompt: bool  # prefill, not decode
    experts: tuple[tuple[int, ...], ...]  # [T][k] in the router's order, without sentinels
    scores: tuple[tuple[float, ...], ...] = ()  # [T][k] weights of the experts; empty: not recorded
    guesses: tuple[Guess, ...] = ()  # made during this call
    fresh: bool = False  # the slots were emptied before it, as the step before broke off
    warmed: tuple[tuple[int, int], ...] = ()  # (layer, expert) loaded by a warm start before it

    @property
    def tokens(self) -> int:
        return len(self.experts)

    @property
    def admit(self) -> int | None:
        """How many experts at the end of `distinct` may evict others (`ExpertCache.decide`).

        For a prompt, these are its last token's choices, which the next token often repeats.
        None means all.
        """
        return len(set(self.experts[-1])) if self.prompt and self.experts else None

    def distinct(self) -> list[int]:
        """The experts asked for, in the order in which an engine asks.

        That is the order of last appearance, so the last token's choices come last.
        """
        backwards = (expert for row in reversed(self.experts) for expert in reversed(row))
        return list(dict.fromkeys(backwards))[::-1]


@dataclass(frozen=True)
class TraceHeader:
    """What a trace was recorded from."""

    model: str
    experts: tuple[int, ...]  # of each MoE layer, in order
    top_k: int
    record_bytes: tuple[int, ...]  # of each layer
    settings: dict[str, Setting] = field(default_factory=dict)  # of the run: slots, policy, ...

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def total_experts(self) -> int:
        return sum(self.experts)


@dataclass(frozen=True)
class Trace:
    """A recorded run."""

    header: TraceHeader
    events: Sequence[Event]

    @property
    def tokens(self) -> int:
        """Tokens that went through the first layer."""
        return sum(event.tokens for event in self.events if event.layer == 0)

    @property
    def generated(self) -> int:
        """Tokens that went through the first layer and were not part of a prompt."""
        return sum(e.tokens for e in self.events if e.layer == 0 and not e.prompt)


class CardSlots(NamedTuple):
    """What one of several cards has."""

    layers: int  # number of its MoE layers; they follow those of the previous card
    slots: int


def cards_text(cards: Iterable[CardSlots]) -> str:
    """The cards as a trace's header has them, like 12:300,12:280 for layers:slots of each."""
    return ",".join(f"{card.layers}:{card.slots}" for card in cards)


@dataclass
class LayerShape(Figures):
    """How one layer's choices are spread over generated tokens."""

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
    said: Guessed = {}
    for event in trace.events:
        if event.prompt:
            continue
        shape = layers[event.layer]
        for row in event.experts:
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


def _compare(shape: LayerShape, event: Event, said: Guessed) -> None:
    """Compare the guesses for this layer with what it asks for, and note the guesses made now."""
    asked = {expert for row in event.experts for expert in row}
    for ahead, experts in said.pop(event.layer, {}).items():
        shape.guessed[ahead] += len(experts)
        shape.right[ahead] += len(experts & asked)
        shape.asked[ahead] += len(asked)
    for guess in event.guesses:
        said.setdefault(guess.layer, {})[guess.layer - event.layer] = frozenset(guess.experts)
