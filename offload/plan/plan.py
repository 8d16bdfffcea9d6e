"""What a model takes at each number of bits on a machine, and which of them to run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload.budget.budget import Budget
from offload.budget.resolve import Resolver
from offload.cache.trace.trace import Trace
from offload.errors import BudgetError, SourceError
from offload.fit import Share
from offload.options import LoadOptions
from offload.pack.recipe import FITTING, AskedBits, Recipe, most_bits
from offload.plan.forecast import Forecast, Workload, forecast
from offload.plan.outline import Outline
from offload.plan.target import Target
from offload.quant.pack import PackInfo
from offload.quant.scheme import Scheme
from offload.units import parse_slots

BITS = (8, 6, 5, 4, 3, 2)
DENSE_BITS = (8, 6, 5, 4)
GOOD_BITS = 4  # fewer cost much quality; they are advised only where 4 bits would wait for a disk


@dataclass(frozen=True)
class PlanRow:
    """The model with its experts at some bits, on the machine."""

    recipe: Recipe
    info: PackInfo
    budget: Budget  # of one card; of several cards the most that any of them has
    chunk: int  # tokens of a prompt that go through the model at once
    shares: tuple[Share, ...]  # of several cards
    slots: int  # over all cards; 0 if not even one fits
    fixed_cache: bool  # there is a second KV cache (`Resolver.keeps_fixed_cache`)
    on_device: bool  # steps are planned on the card, as `--engine auto` does where it can
    refusal: str = ""  # why it does not fit
    rest: str = ""  # RAM or disk, for experts without a slot; where the slots are if all have one
    disk_share: float = 0.0  # share of expert loads that come from disk instead of RAM
    forecast: Forecast | None = None  # None if it does not fit

    @property
    def bits(self) -> Scheme:
        """How most experts are stored."""
        return self.recipe.parts["experts"]

    @property
    def resident(self) -> bool:
        """Whether every expert has a slot."""
        return self.slots >= self.info.total_experts

    @property
    def staging_bytes(self) -> int:
        """Bytes of the rows on a card through which a prompt's experts are streamed."""
        return 0 if self.resident else self.budget.staging * self.budget.slot

    @property
    def pack_bytes(self) -> int:
        """Bytes on disk, where weights that keep their stored width have 16 bits."""
        return self.info.dense_bytes(2) + self.info.expert_bytes


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
    info, config = outline.describe(recipe), outline.config
    resolver = Resolver(options, target.place)
    slots, shares, refusal = 0, tuple[Share, ...](), ""
    try:
        fit = resolver.fit(info, config, outline.model)
        slots, shares = fit.slots, fit.shares
    except BudgetError as error:
        refusal = str(error)
    budget, fixed_cache = resolver.budget(info, config), resolver.keeps_fixed_cache(info)
    dense = [share.dense for share in shares] or [-(-budget.dense // target.cards)]
    kv_cache = [share.kv_cache for share in shares] or [-(-budget.kv_cache // target.cards)]
    row = PlanRow(
        recipe,
        info,
        replace(budget, dense=max(dense), kv_cache=max(kv_cache)),
        resolver.chunk(config),
        shares,
        slots,
        fixed_cache,
        fixed_cache and slots >= 2 * outline.top_k,
        refusal,
    )
    if refusal:
        return row
    if trace is not None:
        _check_trace(trace, outline, info)
    itemsize = resolver.dtype(config).itemsize
    return _with_forecast(row, outline, target, outline.read_bytes(info, itemsize), trace)


def _with_forecast(
    row: PlanRow, outline: Outline, target: Target, dense_bytes: int, trace: Trace | None
) -> PlanRow:
    """`row` with its speed, where each token reads `dense_bytes` beside the experts."""
    info, budget, on_cpu = row.info, row.budget, target.device.type == "cpu"
    held = target.spare_bytes  # in RAM, of experts beside those in slots
    if on_cpu:
        used = budget.dense + budget.kv_cache + budget.workspace + row.slots * budget.slot
        held = max(0, held - used)
    if row.resident:
        rest = "RAM" if on_cpu else "VRAM"
    else:
        rest = "RAM" if info.expert_bytes <= held else "disk"
    # RAM holds as large a part of the misses as of all experts, because experts that have a slot
    # take up their part of it too (docs/log/host-tier.md).
    disk_share = 0.0 if row.resident else max(0.0, 1 - held / info.expert_bytes)
    work = Workload(
        layers=len(info.layers),
        experts=info.total_experts,
        top_k=outline.top_k,
        expert_bytes=info.expert_bytes // info.total_experts,
        dense_bytes=dense_bytes,
        slots=row.slots,
        hardware=target.hardware,
        disk_share=disk_share,
        on_device=row.on_device,
    )
    return replace(row, rest=rest, disk_share=disk_share, forecast=forecast(work, trace))


def _check_trace(trace: Trace, outline: Outline, info: PackInfo) -> None:
    """Raise `BudgetError` for a trace of another model."""
    counts = tuple(layer.num_experts for layer in info.layers)
    header = trace.header
    if header.experts != counts or header.top_k != outline.top_k:
        raise BudgetError(
            f"the trace is of {header.model}, {header.layers} layers of {max(header.experts)} "
            f"experts, top-{header.top_k}; {outline.name} has {len(counts)} of {max(counts)}, "
            f"top-{outline.top_k}: record a trace of this model"
        )


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
    context = Resolver(options, target.place).context(outline.config)
    options = replace(options, context=context)
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
    recipes = {count: base.with_rules(f"experts={count}", group) for count in BITS}
    if asked is not None:
        recipes[asked.parts["experts"].bits] = asked
    return [recipes[count] for count in sorted(recipes, reverse=True)]


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
    """The row with the most bits, `GOOD_BITS` or more, at which every expert is resident.

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
