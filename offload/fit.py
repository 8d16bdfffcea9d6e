"""What the options come to on one machine, as numbers: nothing in a `Fit` is left to be decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.options import LoadOptions
from offload.units import gib

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Card:
    """One of several devices that share a model."""

    number: int
    device: torch.device
    memory: int  # bytes that may be used


@dataclass(frozen=True)
class Share:
    """The part of a model that one of several cards holds."""

    number: int  # of the card
    blocks: range  # decoder layers
    moe_layers: int  # how many of the decoder layers have experts
    experts: int
    slots: int
    dense: int  # bytes
    kv_cache: int  # bytes
    workspace: int  # bytes

    def line(self) -> str:
        """The share as one line for people."""
        layers = f"{len(self.blocks)} layer{'s' * (len(self.blocks) > 1)}"
        return (
            f"GPU {self.number}: {layers}, {self.slots} of {self.experts} experts in memory, plus "
            f"{gib(self.dense)} of dense weights and {gib(self.kv_cache)} of KV cache"
        )


@dataclass(frozen=True)
class Fit:
    """What was asked for, and the numbers that it comes to on this machine."""

    options: LoadOptions
    device: torch.device  # of inputs and logits; with several cards, the first card
    dtype: torch.dtype
    slots: int
    staging: int  # rows beside the slots, through which the experts of a prompt are streamed
    ubatch: int  # tokens of a prompt that go through the model at once
    ram: int  # bytes for experts in host memory
    looks_ahead: bool  # guess experts; with a slot for every expert, guesses gain nothing
    cards: tuple[Card, ...] = ()  # empty where there is one device
    shares: tuple[Share, ...] = ()  # one for each of `cards`

    @property
    def in_place(self) -> bool:
        """Whether experts are computed where their records are mapped, and no slot is filled.

        A user of a CPU who gives a number of slots sees the cache at work.
        """
        return self.device.type == "cpu" and self.options.expert_slots is None

    @property
    def caching(self) -> tuple[tuple[Card, Share], ...]:
        """The cards that hold experts (usually all of them), each with its share."""
        both = zip(self.cards, self.shares, strict=True)
        return tuple((card, share) for card, share in both if share.experts)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device, each once."""
        return tuple(dict.fromkeys(card.device for card in self.cards)) or (self.device,)
