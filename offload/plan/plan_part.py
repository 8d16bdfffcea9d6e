"""`offload plan`: several ways to store a model, on one machine, and the one to run.

Knows: which bits are asked about, which are best. Does not know: what fits (`offload.plan_row`),
where shapes come from (`offload.outline`), how a plan is told (`offload.plan_report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.budget.budget import parse_slots
from offload.errors import BudgetError, SourceError
from offload.pack.recipe import FITTING, AskedBits, Recipe, most_bits
from offload.plan.outline import Outline
from offload.plan.plan import Question, Row, experts_scheme, make_row
from offload.plan.target import Target

BITS = (8, 6, 5, 4, 3, 2)
DENSE_BITS = (8, 6, 5, 4)
GOOD_BITS = 4  # fewer cost much quality (README): less is advised only where 4 wait for a disk


@dataclass(frozen=True)
class Plan:
    """A model on a machine."""

    outline: Outline
    target: Target
    context: int
    ubatch: int
    rows: tuple[Row, ...]
    chosen: Row | None  # the one to run; None: none fits
    remedy: str = ""  # what makes a model fit of which nothing does


def make_plan(outline: Outline, target: Target, question: Question) -> Plan:
    """Every row, and the one to run. Raises `OffloadError`."""
    _check_slots(question.slots)
    asked = _asked(outline, question.bits)
    recipes = _recipes(outline, question.bits, asked)
    rows = tuple(make_row(outline, target, question, recipe) for recipe in recipes)
    if question.bits.fit:
        chosen = _fitting(rows)
    elif asked is not None:
        chosen = next((row for row in rows if row.recipe == asked and not row.refusal), None)
    else:
        chosen = _best(rows)
    remedy = "" if chosen else _remedy(outline, target, question)
    return Plan(outline, target, question.context, question.ubatch, rows, chosen, remedy)


def _check_slots(slots: str | None) -> None:
    """What no machine could do is no row's refusal. Raises `BudgetError`."""
    if parse_slots(slots, 1) == 0:
        raise BudgetError("0 expert slots: at least one is needed, raise --expert-slots")


def _remedy(outline: Outline, target: Target, question: Question) -> str:
    """The most bits of the dense weights with which experts of `GOOD_BITS` fit, as a flag."""
    if outline.made is not None or question.slots is not None:
        return ""
    for bits in DENSE_BITS:
        recipe = Recipe.parse(f"experts={GOOD_BITS},dense={bits}")
        if not make_row(outline, target, question, recipe).refusal:
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
