"""How a model is run: what each card has, and every option as a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.residency import Residency
from offload.units import gib


@dataclass(frozen=True)
class Share:
    """What one card has."""

    number: int  # of the card
    blocks: range  # decoder layers
    moe_layers: int  # of these
    experts: int
    slots: int
    dense: int  # bytes
    kv_cache: int
    workspace: int

    def line(self) -> str:
        """As people read it."""
        layers = f"{len(self.blocks)} layer{'s' * (len(self.blocks) > 1)}"
        return (
            f"card {self.number}: {layers}, {self.slots} slots for {self.experts} experts, beside "
            f"{gib(self.dense)} of dense weights and {gib(self.kv_cache)} of KV cache"
        )


@dataclass(frozen=True)
class Card:
    """One of several devices that share a model."""

    number: int
    device: torch.device
    memory: int  # bytes that may be used


@dataclass(frozen=True)
class Options:
    """How a pack is run, complete: nothing is left to be decided later."""

    device: torch.device  # of inputs and logits; with several cards the first
    dtype: torch.dtype
    slots: int
    residency: Residency
    context: int
    staging: int  # rows past the slots, through which a prompt's experts are streamed
    ubatch: int  # tokens of a prompt that go through the model at once
    cards: tuple[Card, ...] = ()  # where there are several
    shares: tuple[Share, ...] = ()  # what each of them has

    @property
    def caching(self) -> tuple[tuple[Card, Share], ...]:
        """The cards that have experts: as a rule all."""
        both = zip(self.cards, self.shares, strict=True)
        return tuple((card, share) for card, share in both if share.experts)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(card.device for card in self.cards)) or (self.device,)

    @property
    def policy(self) -> str:
        return self.residency.policy

    @property
    def lookahead(self) -> bool | None:
        return self.residency.lookahead
