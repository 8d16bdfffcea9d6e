"""What the routers of a model chose, call by call, as values.

Letters: T tokens of a call, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Setting = str | int | float | bool | None


class Guess(NamedTuple):
    """Experts that a router named ahead for the next step of its layer, likeliest first."""

    layer: int
    experts: tuple[int, ...]
    live: bool = True  # the cache was told and may have loaded them; False: only noted


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

        Of a prompt these are the choices of its last token, which the next token often repeats.
        None means all.
        """
        return len(set(self.experts[-1])) if self.prompt and self.experts else None

    def distinct(self) -> list[int]:
        """The experts asked for, in the order in which an engine asks: by last appearance."""
        return by_last_appearance(self.experts)


def by_last_appearance(rows: Sequence[Sequence[int]]) -> list[int]:
    """Each expert once, in the order of last appearance, so the last token's choices come last."""
    backwards = (expert for row in reversed(rows) for expert in reversed(row))
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

    def decode(self) -> Iterator[Event]:
        return (event for event in self.events if not event.prompt)


class CardSlots(NamedTuple):
    """What one of several cards has."""

    layers: int  # MoE layers, which follow those of the card before
    slots: int


def cards_text(cards: Iterable[CardSlots]) -> str:
    """The cards as a trace's header has them, like 12:300,12:280 for layers:slots of each."""
    return ",".join(f"{card.layers}:{card.slots}" for card in cards)
