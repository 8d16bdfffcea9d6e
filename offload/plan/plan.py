"""One row of a plan: a model with its experts at some bits, on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offload.budget.budget import Budget
from offload.budget.resolve import Place, Resolver
from offload.cache.errors import CacheError
from offload.cache.simulate.forecast import Forecast, Load, forecast, forecast_of
from offload.cache.trace.synthetic import Shape
from offload.cache.trace.trace import Trace
from offload.errors import BudgetError, SourceError
from offload.options import Card, LoadOptions, Share
from offload.pack.recipe import FITTING, AskedBits, Recipe, most_bits
from offload.plan.outline import Outline
from offload.plan.target import Target
from offload.quant.pack import PackInfo
from offload.quant.scheme import Scheme
from offload.units import parse_slots


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
    fixed_cache: bool  # the KV cache is there twice (`Resolver.keeps_fixed_cache`)
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


def make_row(
    outline: Outline,
    target: Target,
    options: LoadOptions,
    recipe: Recipe,
    trace: Trace | None = None,
) -> Row:
    """`recipe` on `target`; a model that does not fit is a row too. Raises `OffloadError`."""
    info = outline.describe(recipe)
    resolver = _resolver(target, options)
    slots, shares, refusal = 0, tuple[Share, ...](), ""
    try:
        fit = resolver.fit(info, outline.config, outline.model)
        slots, shares = fit.slots, fit.shares
    except BudgetError as error:
        refusal = str(error)
    budget = _of_a_card(resolver.budget(info, outline.config), target.cards, shares)
    fixed_cache = resolver.keeps_fixed_cache(info)
    row = Row(
        recipe,
        experts_scheme(recipe),
        info,
        budget,
        resolver.chunk(outline.config),
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
    return replace(row, forecast=_forecast(outline, target, row, held, resolver, trace))


def _resolver(target: Target, options: LoadOptions) -> Resolver:
    cards = tuple(
        Card(number, torch.device(target.device.type, number), target.memory.device)
        for number in range(target.cards)
    )
    return Resolver(options, Place(target.device, target.memory, cards if len(cards) > 1 else ()))


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
    outline: Outline,
    target: Target,
    row: Row,
    held: int,
    resolver: Resolver,
    trace: Trace | None,
) -> Forecast:
    info = row.info
    layers = len(info.layers)
    weights = sum(n.num_experts * info.layout_of(i).weights for i, n in enumerate(info.layers))
    shape = Shape(
        outline.name,
        layers,
        max(layer.num_experts for layer in info.layers),
        outline.top_k,
        info.expert_bytes // info.total_experts,
        outline.read_bytes(info, resolver.dtype(outline.config).itemsize),
        info.expert_bytes * 8 / weights,
    )
    load = Load(shape, target.hardware, row.slots, held, on_device=row.on_device)
    try:
        if trace is None:
            return forecast(load)
        return forecast_of(load, _on_this_model(trace, outline, info))
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


BITS = (8, 6, 5, 4, 3, 2)
DENSE_BITS = (8, 6, 5, 4)
GOOD_BITS = 4  # fewer cost much quality (README): less is advised only where 4 wait for a disk


@dataclass(frozen=True)
class Plan:
    """A model on a machine."""

    outline: Outline
    target: Target
    options: LoadOptions
    rows: tuple[Row, ...]
    chosen: Row | None  # the one to run; None: none fits
    remedy: str = ""  # what makes a model fit of which nothing does


def make_plan(
    outline: Outline, target: Target, options: LoadOptions, trace: Trace | None = None
) -> Plan:
    """Every row, and the one to run. Without a `trace` the routing is made up.

    Raises `OffloadError`.
    """
    _check_slots(options.expert_slots)
    bits = AskedBits.of(options)
    asked = _asked(outline, bits)
    recipes = _recipes(outline, bits, asked)
    rows = tuple(make_row(outline, target, options, recipe, trace) for recipe in recipes)
    if bits.fit:
        chosen = _fitting(rows)
    elif asked is not None:
        chosen = next((row for row in rows if row.recipe == asked and not row.refusal), None)
    else:
        chosen = _best(rows)
    remedy = "" if chosen else _remedy(outline, target, options)
    return Plan(outline, target, options, rows, chosen, remedy)


def _check_slots(slots: int | str | None) -> None:
    """What no machine could do is no row's refusal. Raises `BudgetError`."""
    if parse_slots(slots, 1) == 0:
        raise BudgetError("0 expert slots: at least one is needed, raise --expert-slots")


def _remedy(outline: Outline, target: Target, options: LoadOptions) -> str:
    """The most bits of the dense weights with which experts of `GOOD_BITS` fit, as a flag."""
    if outline.made is not None or options.expert_slots is not None:
        return ""
    for bits in DENSE_BITS:
        recipe = Recipe.parse(f"experts={GOOD_BITS},dense={bits}")
        if not make_row(outline, target, options, recipe).refusal:
            return f"--dense-bits {bits}"
    return ""


def _asked(outline: Outline, bits: AskedBits) -> Recipe | None:
    """The recipe that the user or the pack has settled; None: its bits are what is asked. Raises
    `SourceError`."""
    if outline.made is not None:
        made = Recipe.parse(outline.made.bits)
        if (wanted := bits.on(made)) != made or bits.fit:
            raise SourceError(
                f"{outline.name} is a pack with {made.name}, not {bits.bits or wanted.name}: leave "
                "the option out, or name the checkpoint"
            )
        return made
    settled = bits.bits is not None or bits.expert_bits is not None
    return bits.recipe() if settled else None


def _recipes(outline: Outline, bits: AskedBits, asked: Recipe | None) -> list[Recipe]:
    """One for each number of bits, the most first."""
    if bits.fit:
        return [Recipe.parse(text) for text in FITTING]
    base = asked or bits.on(Recipe())
    group = bits.group_size or 64
    recipes = [base.with_rule(f"experts={count}", group) for count in BITS]
    if asked is not None:
        recipes = [
            asked,
            *(r for r in recipes if experts_scheme(r).bits != experts_scheme(asked).bits),
        ]
    return sorted(recipes, key=lambda recipe: -experts_scheme(recipe).bits)


def _fitting(rows: Sequence[Row]) -> Row | None:
    """What `--bits fit` takes: see `offload.recipe.most_bits`."""
    by_recipe = {row.recipe.name: row for row in rows}

    def row_of(recipe: Recipe) -> Row:
        return by_recipe[recipe.name]

    chosen = row_of(
        most_bits(lambda r: row_of(r).resident, lambda r: row_of(r).rest in ("RAM", "VRAM"))
    )
    return None if chosen.refusal else chosen


def _best(rows: Sequence[Row]) -> Row | None:
    """The most bits that are all resident; else 4 where the disk does not slow them; else the most
    that it does not slow; else 4; else whatever fits."""
    fitting = [row for row in rows if not row.refusal]
    good = [row for row in fitting if row.bits.bits >= GOOD_BITS]
    choices = [
        [row for row in good if row.resident],
        [row for row in good[::-1] if not _waits_for_disk(row)],
        [row for row in fitting if not _waits_for_disk(row)],
        good[::-1],
        fitting,
    ]
    return next((rows[0] for rows in choices if rows), None)


def _waits_for_disk(row: Row) -> bool:
    return row.forecast is not None and row.forecast.limited_by == "disk"
