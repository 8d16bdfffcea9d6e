"""What a model takes at each number of bits on a machine, and which of them to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offload.budget.budget import Budget
from offload.budget.resolve import Place, Resolver
from offload.cache.trace.trace import Trace
from offload.errors import BudgetError, SourceError
from offload.fit import Card, Share
from offload.options import LoadOptions
from offload.pack.recipe import FITTING, AskedBits, Recipe, most_bits
from offload.plan.forecast import Forecast, Workload, forecast
from offload.plan.outline import Outline
from offload.plan.target import Target
from offload.quant.pack import PackInfo
from offload.quant.scheme import Scheme
from offload.units import parse_slots


@dataclass(frozen=True)
class PlanRow:
    """The model with its experts at some bits, on the machine."""

    recipe: Recipe
    bits: Scheme  # of most experts
    info: PackInfo
    budget: Budget  # of one card; of several cards the most that any of them has
    chunk: int  # tokens of a prompt that go through the model at once
    shares: tuple[Share, ...]  # of several cards
    slots: int  # over all cards; 0 if not even one fits
    fixed_cache: bool  # there is a second KV cache (`Resolver.keeps_fixed_cache`)
    on_device: bool  # steps are planned on the card, as `--engine auto` does where it can
    refusal: str = ""  # why it does not fit
    rest: str = ""  # where experts without a slot are: RAM, disk, or VRAM if all have one
    disk_share: float = 0.0  # share of expert loads that come from disk instead of RAM
    forecast: Forecast | None = None  # None if it does not fit

    @property
    def resident(self) -> bool:
        return self.slots >= self.info.total_experts

    @property
    def staging_bytes(self) -> int:
        """On a card: of the rows through which a prompt's experts are streamed."""
        return 0 if self.resident else self.budget.staging * self.budget.slot

    @property
    def pack_bytes(self) -> int:
        """On disk, where weights that keep their stored width have 16 bits."""
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
) -> PlanRow:
    """`recipe` on `target`, with the reason in `refusal` if it does not fit.

    Raises `OffloadError`.
    """
    info = outline.describe(recipe)
    resolver = _resolver(target, options)
    slots, shares, refusal = 0, tuple[Share, ...](), ""
    try:
        fit = resolver.fit(info, outline.config, outline.model)
        slots, shares = fit.slots, fit.shares
    except BudgetError as error:
        refusal = str(error)
    fixed_cache = resolver.keeps_fixed_cache(info)
    row = PlanRow(
        recipe,
        experts_scheme(recipe),
        info,
        _of_a_card(resolver.budget(info, outline.config), target.cards, shares),
        resolver.chunk(outline.config),
        shares,
        slots,
        fixed_cache,
        fixed_cache and slots >= 2 * outline.top_k,
        refusal,
    )
    if refusal:
        return row
    held = _held_in_ram(target, row)
    # RAM holds as large a part of the misses as of all experts, because experts that have a slot
    # take up their part of it too (docs/log/host-tier.md).
    disk_share = 0.0 if row.resident else max(0.0, 1 - held / info.expert_bytes)
    row = replace(row, rest=_rest(target, row, held), disk_share=disk_share)
    itemsize = resolver.dtype(outline.config).itemsize
    return replace(row, forecast=_forecast(outline, target, row, itemsize, trace))


def _resolver(target: Target, options: LoadOptions) -> Resolver:
    cards = tuple(
        Card(number, torch.device(target.device.type, number), target.memory.device)
        for number in range(target.cards)
    )
    return Resolver(options, Place(target.device, target.memory, cards if len(cards) > 1 else ()))


def _of_a_card(whole: Budget, cards: int, shares: tuple[Share, ...]) -> Budget:
    """The most of each part that a card has; equal parts if the layers do not fit on the cards."""
    return replace(
        whole,
        dense=max((share.dense for share in shares), default=-(-whole.dense // cards)),
        kv_cache=max((share.kv_cache for share in shares), default=-(-whole.kv_cache // cards)),
        total_experts=max(
            (share.experts for share in shares), default=-(-whole.total_experts // cards)
        ),
    )


def _held_in_ram(target: Target, row: PlanRow) -> int:
    """Bytes of experts that RAM holds beside those in slots."""
    if target.device.type != "cpu":
        return target.spare_bytes
    budget = row.budget
    used = budget.dense + budget.kv_cache + budget.workspace + row.slots * budget.slot
    return max(0, target.spare_bytes - used)


def _rest(target: Target, row: PlanRow, held: int) -> str:
    if row.resident:
        return "RAM" if target.device.type == "cpu" else "VRAM"
    return "RAM" if row.info.expert_bytes <= held else "disk"


def _forecast(
    outline: Outline, target: Target, row: PlanRow, itemsize: int, trace: Trace | None
) -> Forecast:
    """`itemsize`: bytes of a weight that is kept as stored, when it is computed with."""
    info = row.info
    work = Workload(
        layers=len(info.layers),
        experts=info.total_experts,
        top_k=outline.top_k,
        expert_bytes=info.expert_bytes // info.total_experts,
        dense_bytes=outline.read_bytes(info, itemsize),
        slots=row.slots,
        hardware=target.hardware,
        disk_share=row.disk_share,
        on_device=row.on_device,
    )
    if trace is not None:
        _check_trace(trace, outline, info)
    return forecast(work, trace)


def _check_trace(trace: Trace, outline: Outline, info: PackInfo) -> None:
    """Raise `BudgetError` for a trace of another model."""
    counts = tuple(layer.num_experts for layer in info.layers)
    header = trace.header
    if header.experts != counts or header.top_k != outline.top_k:
        raise BudgetError(
            f"the trace is of {header.model}, {header.layers} layers of {max(header.experts)} "
            f"experts, top-{header.top_k}; {outline.name} has {len(counts)} of {max(counts)}, "
            f"top-{outline.top_k}: record one of it"
        )


BITS = (8, 6, 5, 4, 3, 2)
DENSE_BITS = (8, 6, 5, 4)
GOOD_BITS = 4  # fewer cost much quality; they are advised only where 4 bits would wait for a disk


@dataclass(frozen=True)
class Plan:
    """A model on a machine."""

    outline: Outline
    target: Target
    options: LoadOptions
    rows: tuple[PlanRow, ...]
    chosen: PlanRow | None  # the one to run; None if none fits
    remedy: str = ""  # if none fits: the option that makes one fit


def make_plan(
    outline: Outline, target: Target, options: LoadOptions, trace: Trace | None = None
) -> Plan:
    """Every row, and the one to run. Without a `trace` the hit rates are assumed.

    Raises `OffloadError`.
    """
    if parse_slots(options.expert_slots, 1) == 0:  # on any machine, so it is no row's refusal
        raise BudgetError("0 expert slots: at least one is needed, raise --expert-slots")
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


def _remedy(outline: Outline, target: Target, options: LoadOptions) -> str:
    """The option with the most bits of dense weights at which experts of `GOOD_BITS` bits fit."""
    if outline.made is not None or options.expert_slots is not None:
        return ""
    for bits in DENSE_BITS:
        recipe = Recipe.parse(f"experts={GOOD_BITS},dense={bits}")
        if not make_row(outline, target, options, recipe).refusal:
            return f"--dense-bits {bits}"
    return ""


def _asked(outline: Outline, bits: AskedBits) -> Recipe | None:
    """The recipe that the user asks for or the pack has; None if the bits are left to the plan.

    Raises `SourceError`.
    """
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
    """A recipe for each number of bits, the most bits first."""
    if bits.fit:
        return [Recipe.parse(text) for text in FITTING]
    base = asked or bits.on(Recipe())
    group = bits.group_size or 64
    recipes = [base.with_rules(f"experts={count}", group) for count in BITS]
    if asked is not None:
        recipes = [
            asked,
            *(r for r in recipes if experts_scheme(r).bits != experts_scheme(asked).bits),
        ]
    return sorted(recipes, key=lambda recipe: -experts_scheme(recipe).bits)


def _fitting(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row that `--bits fit` takes (`offload.pack.recipe.most_bits`)."""
    by_name = {row.recipe.name: row for row in rows}
    chosen = most_bits(
        lambda recipe: by_name[recipe.name].resident,
        lambda recipe: by_name[recipe.name].rest in ("RAM", "VRAM"),
    )
    row = by_name[chosen.name]
    return None if row.refusal else row


def _best(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row with the most bits at which every expert is resident.

    If there is none: 4 bits unless they wait for the disk; else the most bits that do not wait for
    it; else 4 bits; else the most bits that fit.
    """
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


def _waits_for_disk(row: PlanRow) -> bool:
    return row.forecast is not None and row.forecast.limited_by == "disk"
