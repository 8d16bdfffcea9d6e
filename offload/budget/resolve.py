"""What was asked, resolved to numbers for one machine before anything is made or allocated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from offload.budget.blocks import demand
from offload.budget.budget import (
    Budget,
    Memory,
    available_bytes,
    chunk_tokens,
    kv_cache_bytes,
    staging_rows,
    workspace_bytes,
)
from offload.budget.placement import place
from offload.errors import BudgetError
from offload.options import Card, Fit, LoadOptions, Share
from offload.quant.pack import PackInfo
from offload.units import parse_bytes, parse_slots


@dataclass(frozen=True)
class Place:
    """Where a model runs."""

    device: torch.device  # of inputs and logits: the only one, or the first card
    memory: Memory
    cards: tuple[Card, ...] = ()  # in the order of the layers; empty where there is one device


@dataclass(frozen=True)
class Resolver:
    """Tells how a pack would be run: `load` and `offload plan` both ask it."""

    options: LoadOptions
    place: Place

    def fit(
        self, info: PackInfo, config: PreTrainedConfig, model: PreTrainedModel | None = None
    ) -> Fit:
        """How a pack like `info` would be run. For several cards the whole `model` is needed, on
        the meta device.

        Raises `BudgetError`.
        """
        asked = parse_slots(self.options.expert_slots, info.total_experts)
        shares: tuple[Share, ...] = ()
        if self.place.cards:
            assert model is not None, "what each layer weighs is counted on a model"
            shares = self._shares(info, config, model, asked)
            slots = sum(share.slots for share in shares)
        else:
            slots = self.budget(info, config).slots(asked)
        device, everything = self.place.device, slots >= info.total_experts
        return Fit(
            self.options,
            device,
            self.dtype(config),
            slots,
            staging=0 if everything else staging_rows(device, info.slot_bytes),
            ubatch=self.chunk(config),
            ram=self.place.memory.ram,
            cards=self.place.cards,
            shares=shares,
        )

    def _shares(
        self, info: PackInfo, config: PreTrainedConfig, model: PreTrainedModel, asked: int | None
    ) -> tuple[Share, ...]:
        """Every card's share, with rows through which prompts are streamed unless all experts have
        a slot."""
        budget, context = self.budget(info, config), self.options.context
        needs = demand(
            model, info, config, context, self.dtype(config), self.chunk(config), budget.workspace
        )
        memory = [card.memory for card in self.place.cards]
        numbers = [card.number for card in self.place.cards]
        shares = place(needs, memory, asked, numbers=numbers)
        if budget.staging and sum(share.slots for share in shares) < info.total_experts:
            beside = budget.workspace + budget.staging * budget.slot
            shares = place(replace(needs, workspace=beside), memory, asked, numbers=numbers)
        return shares

    def budget(self, info: PackInfo, config: PreTrainedConfig) -> Budget:
        """What goes into the compute device's memory beside the experts, and into how much."""
        device, dtype, context = self.place.device, self.dtype(config), self.options.context
        ubatch = self.chunk(config)
        kv_cache = kv_cache_bytes(config, context, dtype, ubatch)
        if self.keeps_fixed_cache(info):
            kv_cache += kv_cache_bytes(config, context, dtype, fixed=True)
        return Budget(
            self.place.memory.device,
            dense=info.dense_bytes(dtype.itemsize),
            kv_cache=kv_cache,
            workspace=workspace_bytes(config, info, ubatch, context, dtype),
            slot=info.slot_bytes,
            total_experts=info.total_experts,
            staging=0 if device.type == "cpu" else staging_rows(device, info.slot_bytes),
        )

    def chunk(self, config: PreTrainedConfig) -> int:
        """Tokens of a prompt at once, on the card with the least memory. Raises `BudgetError`."""
        cards, asked = self.place.cards, self.options
        memory = min((card.memory for card in cards), default=self.place.memory.device)
        return chunk_tokens(config, asked.ubatch_size, asked.context, memory, self.dtype(config))

    def keeps_fixed_cache(self, info: PackInfo) -> bool:
        """Whether there is a second KV cache, of fixed size, for steps captured as CUDA graphs: on
        one card, where RAM may hold all experts. What else `offload.device.making` asks, such as
        whether memory can be pinned, is seen on the machine.
        """
        on_card = self.place.device.type == "cuda" and not self.place.cards
        may_plan = self.options.engine != "host"
        return on_card and may_plan and info.expert_bytes <= self.place.memory.ram

    def dtype(self, config: PreTrainedConfig) -> torch.dtype:
        """The type of the computation: what was asked for, else what the config says."""
        return self.options.dtype or _config_dtype(config)


def _config_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def find_device(name: str | torch.device | None) -> torch.device:
    """The compute device called `name`, a GPU with its number; None: a GPU if there is one.

    Raises `BudgetError`.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BudgetError(
            f"there is no device {name!r}: name cpu, cuda, or one like cuda:1"
        ) from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= gpus
    ):
        raise BudgetError(
            f"there is no device {str(name)!r} here: torch sees the CPU and {gpus} CUDA GPUs"
        )
    if device.type == "cuda" and device.index is None:  # some of torch's functions want a number
        return torch.device("cuda", torch.cuda.current_device())
    return device


def set_threads(count: int) -> None:
    """Compute with `count` CPU threads."""
    torch.set_num_threads(count)


logger = logging.getLogger("offload")


def find_place(options: LoadOptions) -> Place:
    """One device, or the cards of `options.gpus`: numbers like "0,1". `options.vram` is a size for
    each card, or several with commas between.

    For tests, `gpus` may be a sequence of names of devices: ("cpu", "cpu") are two, in halves of
    RAM. Raises `BudgetError`.
    """
    device, gpus, vram, ram = options.device, options.gpus, options.vram, options.ram
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


def _names(gpus: str | Sequence[int | str]) -> list[str]:
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
