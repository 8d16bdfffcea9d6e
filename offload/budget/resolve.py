"""Turns options into numbers for one machine, before anything is made or allocated."""

import logging
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from offload.budget.budget import (
    Budget,
    Memory,
    available_bytes,
    chunk_tokens,
    kv_cache_bytes,
    staging_rows,
    workspace_bytes,
)
from offload.budget.placement import demand, place
from offload.errors import BudgetError
from offload.fit import Card, Fit, Share
from offload.options import CONTEXT, LoadOptions
from offload.quant.pack import PackInfo
from offload.units import parse_bytes, parse_gpus, parse_sizes, parse_slots

logger = logging.getLogger("offload")


@dataclass(frozen=True)
class Place:
    """Where a model runs, and the memory that it may use there."""

    device: torch.device  # of inputs and logits; with several cards, the first card
    memory: Memory
    cards: tuple[Card, ...] = ()  # in the order of the layers; empty where there is one device


@dataclass(frozen=True)
class Resolver:
    """Decides how a pack is run, for `load` and `offload plan` alike."""

    options: LoadOptions
    place: Place

    def fit(
        self, info: PackInfo, config: PreTrainedConfig, model: PreTrainedModel | None = None
    ) -> Fit:
        """How a pack like `info` is run.

        With several cards, the whole `model` is needed, on the meta device, to weigh its layers.
        Raises `BudgetError`.
        """
        asked = parse_slots(self.options.expert_slots, info.total_experts)
        shares: tuple[Share, ...] = ()
        if self.place.cards:
            assert model is not None, "several cards need a model to weigh its layers"
            shares = self._shares(info, config, model, asked)
            slots = sum(share.slots for share in shares)
        else:
            slots = self.budget(info, config).slots(asked)
        device, everything = self.place.device, slots >= info.total_experts
        return Fit(
            replace(self.options, context=self.context(config)),
            device,
            self.dtype(config),
            slots,
            staging=0 if everything else staging_rows(device, info.slot_bytes),
            ubatch=self.chunk(config),
            ram=self.place.memory.ram,
            looks_ahead=self.options.lookahead is not False and not everything,
            cards=self.place.cards,
            shares=shares,
        )

    def _shares(
        self, info: PackInfo, config: PreTrainedConfig, model: PreTrainedModel, asked: int | None
    ) -> tuple[Share, ...]:
        """The share of each card.

        Unless every expert has a slot, memory is kept for the staging rows of prompts.
        """
        budget, context = self.budget(info, config), self.context(config)
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
        """The compute device's memory, and what it must hold beside the experts."""
        device, dtype, context = self.place.device, self.dtype(config), self.context(config)
        ubatch = self.chunk(config)
        kv_cache = sum(kv_cache_bytes(config, context, dtype, ubatch))
        if self.keeps_fixed_cache(info):
            kv_cache += sum(kv_cache_bytes(config, context, dtype, fixed=True))
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
        """Tokens of a prompt that go through the model at once.

        The card with the least memory decides. Raises `BudgetError`.
        """
        cards, asked = self.place.cards, self.options.ubatch_size
        memory = min((card.memory for card in cards), default=self.place.memory.device)
        return chunk_tokens(config, asked, self.context(config), memory, self.dtype(config))

    def context(self, config: PreTrainedConfig) -> int:
        """Tokens that a conversation may have.

        0 stands for as many as the model has positions, which also limits the default. Raises
        `BudgetError` if more are asked for and the model's positions are not scaled.
        """
        text, asked = config.get_text_config(), self.options.context
        positions = getattr(text, "max_position_embeddings", None)
        if not isinstance(positions, int) or positions < 1:
            if asked == 0:
                raise BudgetError("the model's config does not tell its context: give --ctx-size")
            return asked
        rope = getattr(text, "rope_parameters", None) or {}
        kinds = [each for each in rope.values() if isinstance(each, dict)] or [rope]
        scaled = any(kind.get("rope_type", "default") != "default" for kind in kinds)
        if asked == 0 or (asked == CONTEXT and not scaled):
            return min(positions, asked or positions)
        if asked > positions and not scaled:
            raise BudgetError(
                f"a context of {asked} tokens is more than the model's {positions} positions: "
                "lower --ctx-size, or give 0 for all of them"
            )
        return asked

    def keeps_fixed_cache(self, info: PackInfo) -> bool:
        """Whether memory is kept for a second KV cache, of fixed size, for CUDA graphs.

        CUDA graphs are used on a single card when RAM may hold all experts. Other conditions, such
        as whether memory can be pinned, are only known once the engine is made
        (`offload.engine.device.make`).
        """
        on_card = self.place.device.type == "cuda" and not self.place.cards
        may_plan = self.options.engine != "host"
        return on_card and may_plan and info.expert_bytes <= self.place.memory.ram

    def dtype(self, config: PreTrainedConfig) -> torch.dtype:
        """The type of the computation: the one asked for, else the one of the config."""
        asked = self.options.dtype
        if isinstance(asked, str):
            asked = None if asked == "auto" else getattr(torch, asked)
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        return asked or (own if isinstance(own, torch.dtype) else torch.bfloat16)


def find_device(name: str | torch.device | None) -> torch.device:
    """The compute device called `name`; without a name, a GPU if there is one, else the CPU.

    A GPU always comes with its number. Raises `BudgetError`.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BudgetError(
            f"there is no device {name!r}: choose cpu, cuda, or a GPU by its number, like cuda:1"
        ) from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= gpus
    ):
        found = f"or cuda:0 to cuda:{gpus - 1}" if gpus else "(no CUDA GPU found)"
        raise BudgetError(f"device {str(name)!r} is not supported here: use cpu {found}")
    if device.type == "cuda" and device.index is None:  # some functions of torch need it
        return torch.device("cuda", torch.cuda.current_device())
    return device


def find_place(options: LoadOptions) -> Place:
    """The device of `options.device`, or the cards of `options.gpus`, and their memory.

    `gpus` is text like "0,1", and `vram` one size for all cards or a size for each, separated by
    commas. Tests pass names of devices as `gpus`: ("cpu", "cpu") stands for two cards that share
    the RAM. Raises `BudgetError`.
    """
    device, gpus, vram, ram = options.device, options.gpus, options.vram, options.ram
    if gpus is not None and device is not None:
        raise BudgetError("both --device and --gpus say where to run: give only one of them")
    devices = [find_device(name) for name in ([device] if gpus is None else parse_gpus(gpus))]
    if len(devices) == 1:
        count = torch.cuda.device_count() if devices[0].type == "cuda" else 1
        if gpus is None and device in (None, "cuda") and count > 1:
            logger.warning(
                "using only GPU %d of %d: --gpus %s uses all of them",
                torch.cuda.current_device(),
                count,
                ",".join(map(str, range(count))),
            )
        return Place(devices[0], Memory.of(devices[0], vram, ram))
    sizes = parse_sizes(vram, len(devices))
    host = available_bytes(torch.device("cpu"), parse_bytes(ram))
    cards = tuple(
        Card(each.index, each, available_bytes(each, size))
        if each.type == "cuda"
        else Card(number, each, host // len(devices))
        for number, (each, size) in enumerate(zip(devices, sizes, strict=True))
    )
    return Place(devices[0], Memory(sum(card.memory for card in cards), host), cards)
