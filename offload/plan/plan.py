"""One row of a plan: a model with its experts at some bits, on a machine.

Knows: the arithmetic that `load` does too (`offload.planning`). Does not know: which bits are asked
about, which row is best (`offload.plan`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from offload.budget.budget import UBATCH, Budget
from offload.budget.placement import Share
from offload.budget.resolve import Planner
from offload.cache.errors import CacheError
from offload.cache.simulate.forecast import Forecast, Load, forecast, forecast_of
from offload.cache.trace.synthetic import Shape
from offload.cache.trace.trace import Trace
from offload.engine.handle import Card
from offload.errors import BudgetError
from offload.pack.recipe import AskedBits, Recipe
from offload.plan.outline import Outline
from offload.plan.target import Target
from offload.quant.pack import PackInfo
from offload.quant.scheme import Scheme


@dataclass(frozen=True)
class Question:
    """What is asked, beside model and machine."""

    bits: AskedBits = field(default_factory=AskedBits)
    slots: str | None = None
    context: int = 4096
    ubatch: int = UBATCH
    trace: Trace | None = None


@dataclass(frozen=True)
class Row:
    """The model with its experts at some bits, on the machine."""

    recipe: Recipe
    bits: Scheme  # of most experts
    info: PackInfo
    budget: Budget  # of one card; of several the most that one has
    chunk: int  # tokens of a prompt at once
    shares: tuple[Share, ...]  # of several cards
    slots: int  # over all cards; 0 when not even one fits
    rest: str  # where the others are: VRAM (there are none), RAM, disk; "" when it does not fit
    disk_share: float  # of what is loaded into slots: what comes from the disk
    refusal: str  # why it does not fit
    fixed_cache: bool  # the KV cache is there twice (`Planner.keeps_fixed_cache`)
    on_device: bool  # steps are planned on the card, as `--engine auto` does where it can
    forecast: Forecast | None

    @property
    def resident(self) -> bool:
        return self.slots >= self.info.total_experts

    @property
    def staging_bytes(self) -> int:
        """On a card, for prompts to be streamed through."""
        return 0 if self.resident else self.budget.staging * self.budget.slot

    @property
    def pack_bytes(self) -> int:
        """On the disk, where weights that are kept as stored have 16 bits."""
        return self.info.dense_bytes(2) + self.info.expert_bytes


def experts_scheme(recipe: Recipe) -> Scheme:
    """How most experts are stored."""
    return recipe.parts["experts"]


def make_row(outline: Outline, target: Target, question: Question, recipe: Recipe) -> Row:
    """`recipe` on `target`; a model that does not fit is a row too. Raises `OffloadError`."""
    info = outline.describe(recipe)
    planner = _planner(target, question)
    slots, shares, refusal = 0, tuple[Share, ...](), ""
    try:
        options = planner(info, outline.config, outline.model)
        slots, shares = options.slots, options.shares
    except BudgetError as error:
        refusal = str(error)
    budget = _of_a_card(planner.budget(info, outline.config), target.cards, shares)
    fixed_cache = planner.keeps_fixed_cache(info)
    row = Row(
        recipe,
        experts_scheme(recipe),
        info,
        budget,
        planner.chunk(outline.config),
        shares,
        slots,
        "",
        0.0,
        refusal,
        fixed_cache,
        fixed_cache and slots >= 2 * outline.top_k,
        None,
    )
    if refusal:
        return row
    held = _held_in_ram(target, row)
    row = replace(row, rest=_rest(target, row, held), disk_share=_disk_share(row, held))
    return replace(row, forecast=_forecast(outline, target, question, row, held))


def _planner(target: Target, question: Question) -> Planner:
    cards = tuple(
        Card(number, torch.device(target.device.type, number), target.memory.device)
        for number in range(target.cards)
    )
    return Planner(
        target.device,
        target.memory,
        slots=question.slots,
        context=question.context,
        ubatch=question.ubatch,
        cards=cards if target.cards > 1 else (),
    )


def _of_a_card(whole: Budget, cards: int, shares: tuple[Share, ...]) -> Budget:
    """The most that a card has of each; where they cannot be shared out, equal parts."""
    return replace(
        whole,
        dense=max((share.dense for share in shares), default=-(-whole.dense // cards)),
        kv_cache=max((share.kv_cache for share in shares), default=-(-whole.kv_cache // cards)),
        total_experts=max(
            (share.experts for share in shares), default=-(-whole.total_experts // cards)
        ),
    )


def _held_in_ram(target: Target, row: Row) -> int:
    """Bytes of experts that RAM holds beside the slots."""
    if target.device.type != "cpu":
        return target.spare_bytes
    budget = row.budget
    used = budget.dense + budget.kv_cache + budget.workspace + row.slots * budget.slot
    return max(0, target.spare_bytes - used)


def _rest(target: Target, row: Row, held: int) -> str:
    if row.resident:
        return "RAM" if target.device.type == "cpu" else "VRAM"
    return "RAM" if row.info.expert_bytes <= held else "disk"


def _disk_share(row: Row, held: int) -> float:
    """Of the experts without a slot RAM holds as large a part as of all: what has a slot too takes
    its part of it (docs/log.md)."""
    return 0.0 if row.resident else max(0.0, 1 - held / row.info.expert_bytes)


def _forecast(
    outline: Outline, target: Target, question: Question, row: Row, held: int
) -> Forecast:
    info = row.info
    layers = len(info.layers)
    weights = sum(n.num_experts * info.layout_of(i).weights for i, n in enumerate(info.layers))
    planner = _planner(target, question)
    shape = Shape(
        outline.name,
        layers,
        max(layer.num_experts for layer in info.layers),
        outline.top_k,
        info.expert_bytes // info.total_experts,
        outline.read_bytes(info, planner.compute_dtype(outline.config).itemsize),
        info.expert_bytes * 8 / weights,
    )
    load = Load(shape, target.hardware, row.slots, held, on_device=row.on_device)
    try:
        if question.trace is None:
            return forecast(load)
        return forecast_of(load, _on_this_model(question.trace, outline, info))
    except CacheError as error:
        raise BudgetError(str(error)) from None


def _on_this_model(trace: Trace, outline: Outline, info: PackInfo) -> Trace:
    """The trace, with records of the sizes that are planned. Raises `BudgetError`."""
    counts = tuple(layer.num_experts for layer in info.layers)
    header = trace.header
    if header.experts != counts or header.top_k != outline.top_k:
        raise BudgetError(
            f"the trace is of {header.model}, {header.layers} layers of {max(header.experts)} "
            f"experts, top-{header.top_k}; {outline.name} has {len(counts)} of {max(counts)}, "
            f"top-{outline.top_k}: record one of it"
        )
    sizes = tuple(info.layout_of(layer).record_bytes for layer in range(len(counts)))
    return Trace(replace(header, record_bytes=sizes), trace.events)
