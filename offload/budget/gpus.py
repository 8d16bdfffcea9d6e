"""Which device or cards a model is to run on, and the memory it may use there.

Knows: what users write, devices, free memory. Does not know: models, what is put where.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.budget.budget import Memory, available_bytes, parse_bytes
from offload.budget.resolve import find_device
from offload.engine.handle import Card
from offload.errors import BudgetError

logger = logging.getLogger("offload")

Gpus = str | Sequence[int | str]


@dataclass(frozen=True)
class Place:
    """Where a model runs."""

    device: torch.device  # of inputs and logits: the only one, or the first card
    memory: Memory
    cards: tuple[Card, ...] = ()  # in the order of the layers; empty where there is one device


def find_place(
    device: str | torch.device | None,
    gpus: Gpus | None,
    vram: str | int | None,
    ram: str | int | None,
) -> Place:
    """One device, or the cards of `gpus`: numbers like "0,1". `vram`: a size for each card, or
    several with commas between.

    For tests, `gpus` may be a sequence of names of devices: ("cpu", "cpu") are two, in halves of
    RAM. Raises `BudgetError`.
    """
    if gpus is None:
        place = find_device(device)
        if device in (None, "cuda") and place.type == "cuda" and torch.cuda.device_count() > 1:
            everything = ",".join(map(str, range(torch.cuda.device_count())))
            logger.warning(
                "using card %d of %d, the others are idle: use them with --gpus %s",
                torch.cuda.current_device(),
                torch.cuda.device_count(),
                everything,
            )
        return Place(place, Memory.of(place, vram, ram))
    if device is not None:
        raise BudgetError("both --device and --gpus say where to run: give one of them")
    devices = [find_device(name) for name in _names(gpus)]
    if len(devices) == 1:
        return Place(devices[0], Memory.of(devices[0], vram, ram))
    given, sizes = parse_bytes(ram), _sizes(vram, len(devices))
    cards = tuple(
        Card(
            place.index if place.index is not None else number,
            place,
            available_bytes(place, size, given) // (1 if place.type == "cuda" else len(devices)),
        )
        for number, (place, size) in enumerate(zip(devices, sizes, strict=True))
    )
    host = available_bytes(torch.device("cpu"), None, given)
    return Place(devices[0], Memory(sum(card.memory for card in cards), host), cards)


def _names(gpus: Gpus) -> list[str]:
    """Names of devices. Text has numbers only, each once."""
    if not isinstance(gpus, str):
        names = [f"cuda:{gpu}" if isinstance(gpu, int) else gpu for gpu in gpus]
    else:
        parts = [part.strip() for part in gpus.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise BudgetError(f"--gpus {gpus!r} are not cards: write their numbers like 0,1")
        names = [f"cuda:{int(part)}" for part in parts]
    cuda = [name for name in names if name != "cpu"]
    if not names or len(set(cuda)) < len(cuda):
        raise BudgetError(f"--gpus {gpus!r}: name each card once, like 0,1")
    return names


def _sizes(vram: str | int | None, cards: int) -> list[int | None]:
    """Bytes on each card."""
    if not isinstance(vram, str) or "," not in vram:
        return [parse_bytes(vram)] * cards
    sizes = [parse_bytes(part) for part in vram.split(",")]
    if len(sizes) != cards:
        raise BudgetError(
            f"--vram has {len(sizes)} sizes for {cards} cards: give one for each, or one for all"
        )
    return sizes
