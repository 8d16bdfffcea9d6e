"""What the routers of a model chose, call by call, as values.

Knows: which experts were chosen with which weights, what was guessed, and what else changed who is
resident. Does not know: the file (`cache.trace_file`), nor what a cache makes of it
(`cache.replay`).

Letters: T tokens of a call, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Setting = str | int | float | bool | None


class Guess(NamedTuple):
    """Experts a predictor named for the next step of a layer, likeliest first."""

    layer: int
    experts: tuple[int, ...]
    live: bool = True  # handed to the cache, which may have loaded them; else only noted


class Event(NamedTuple):
    """One call of one MoE layer, and what preceded it."""

    layer: int
    prompt: bool  # prefill, not decode
    experts: tuple[tuple[int, ...], ...]  # [T][k] in the router's order, sentinels left out
    scores: tuple[tuple[float, ...], ...] = ()  # [T][k] as given to the seam; empty: not recorded
    guesses: tuple[Guess, ...] = ()  # made during this call
    fresh: bool = False  # the slots were emptied before it: the step before broke off
    warmed: tuple[tuple[int, int], ...] = ()  # (layer, expert) loaded by a warm start before it

    @property
    def tokens(self) -> int:
        return len(self.experts)

    @property
    def admit(self) -> int | None:
        """How many of `distinct`, from the end, may take others' slots (`ExpertCache.decide`): of a
        prompt what its last token chose, since the next token often chooses it again."""
        return len(set(self.experts[-1])) if self.prompt and self.experts else None

    def distinct(self) -> list[int]:
        """The experts asked for, in the order in which the engine asks: by last appearance."""
        return by_last_appearance(self.experts)


def by_last_appearance(rows: Sequence[Sequence[int]]) -> list[int]:
    """Each expert once; what the last tokens chose comes last, so that it is there for the next."""
    backwards = (expert for row in reversed(rows) for expert in reversed(row))
    return list(dict.fromkeys(backwards))[::-1]


@dataclass(frozen=True)
class TraceHeader:
    """What a trace was recorded from."""

    model: str
    experts: tuple[int, ...]  # of each MoE layer, in order
    top_k: int
    record_bytes: tuple[int, ...]  # of each layer
    settings: dict[str, Setting] = field(default_factory=dict)  # of the live run: slots, policy, ..

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
        """Those of them that were not of a prompt."""
        return sum(e.tokens for e in self.events if e.layer == 0 and not e.prompt)

    def decode(self) -> Iterator[Event]:
        return (event for event in self.events if not event.prompt)


class CardSlots(NamedTuple):
    """One card's part."""

    layers: int  # that follow those of the card before
    slots: int


def cards_text(cards: Iterable[CardSlots]) -> str:
    """Cards as a trace's header has them: layers:slots of each."""
    return ",".join(f"{card.layers}:{card.slots}" for card in cards)
