"""Reads rules and presets that say with how many bits each part of a model is stored.

    experts=3,attention=4,layers.0-1.experts=8

Rules are read from left to right, and a later one wins. A preset stands for a list of rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import TYPE_CHECKING

from offload.errors import RecipeError
from offload.lines import did_you_mean
from offload.options import LoadOptions
from offload.quant.scheme import Scheme

if TYPE_CHECKING:
    from offload.quant.pack import PackInfo

PARTS = ("experts", "attention", "shared", "mlp", "head", "embeddings")
# The parts that `dense=` stands for. Embeddings are not among them: few rows are read for a token.
DENSE = ("attention", "shared", "mlp", "head")
AS_STORED = Scheme(16)
PRESETS = MappingProxyType(
    {
        "q8": "experts=8,dense=8",
        "q6": "experts=6,dense=6",
        "q5": "experts=5,dense=6",  # fewer dense bits would save little and cost much quality
        "q4": "experts=4,dense=6",
        "q3": "experts=3g32,dense=6",
        "q2": "experts=2g16s8,dense=6",
        "mixtral-offloading": "experts=2g16s8,attention=4g64s8",  # the default of arXiv 2312.17238
    }
)
FIT = "fit"  # the budget chooses the first of `FITTING` at which all experts are resident
FITTING = ("q8", "q6", "q5", "q4", "q3", "q2")
_RULE = re.compile(r"(?:layers\.(\d{1,4})(?:-(\d{1,4}))?\.)?(\w+)=(\w+)")


@dataclass(frozen=True)
class LayerRule:
    """The scheme of a part in the decoder layers `first` to `last`, both included."""

    first: int
    last: int
    part: str
    scheme: Scheme

    def __str__(self) -> str:
        layers = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"layers.{layers}.{self.part}={self.scheme}"


@dataclass(frozen=True)
class Recipe:
    """How every weight of a model is stored: by default, experts in 4 bits and the rest as it was.

    `str` gives a text that `parse` reads back.
    """

    parts: Mapping[str, Scheme] = field(
        default_factory=lambda: {**dict.fromkeys(PARTS, AS_STORED), "experts": Scheme(4)}
    )
    layer_rules: tuple[LayerRule, ...] = ()

    @classmethod
    def parse(cls, text: str, group_size: int = 64) -> Recipe:
        """The default recipe, changed by rules or presets.

        `group_size` is for rules that name none. Raises `RecipeError`.
        """
        return cls().with_rules(text, group_size)

    def scheme(self, part: str, layer: int | None) -> Scheme:
        """How `part` is stored in decoder layer `layer`, which is None outside of the layers."""
        for rule in reversed(self.layer_rules):
            if rule.part == part and layer is not None and rule.first <= layer <= rule.last:
                return rule.scheme
        return self.parts[part]

    def check_layers(self, last: int) -> None:
        """Raise `RecipeError` when a rule names layers after `last`, the model's last one."""
        for rule in self.layer_rules:
            if rule.last > last:
                raise RecipeError(f"{rule}: the model has layers 0 to {last}, name some of them")

    def __str__(self) -> str:
        parts = [
            f"{part}={scheme}"
            for part, scheme in self.parts.items()
            if part == "experts" or scheme != AS_STORED
        ]
        return ",".join([*parts, *map(str, self.layer_rules)])

    @property
    def name(self) -> str:
        """The name of the preset that equals this recipe, else its rules."""
        presets = (name for name in PRESETS if Recipe.parse(name) == self)
        return next(presets, str(self))

    def with_rules(self, text: str, group_size: int = 64) -> Recipe:
        """This recipe, changed by rules or presets. Raises `RecipeError`."""
        rule = PRESETS.get(text.strip(), text.strip())
        if "," in rule:
            rules = rule.split(",")
            return reduce(lambda recipe, part: recipe.with_rules(part, group_size), rules, self)
        match = _RULE.fullmatch(rule)
        if match is None:
            raise RecipeError(_no_rule(rule))
        first, last, part, how = match.groups()
        if part not in (*PARTS, "dense"):
            raise RecipeError(
                f"{rule}: there is no part {part!r}{did_you_mean(part, PARTS)}: the parts are "
                f"{', '.join(PARTS)}, and dense for all but experts and embeddings"
            )
        try:
            scheme = Scheme.parse(how, group_size)
        except ValueError as error:
            raise RecipeError(f"{rule}: {error}") from None
        parts = DENSE if part == "dense" else (part,)
        if first is None:
            kept = tuple(rule for rule in self.layer_rules if rule.part not in parts)
            return Recipe({**self.parts, **dict.fromkeys(parts, scheme)}, kept)
        if int(first) > int(last or first):
            raise RecipeError(f"layers.{first}-{last} has no layers: write the lower one first")
        new = (LayerRule(int(first), int(last or first), name, scheme) for name in parts)
        return replace(self, layer_rules=(*self.layer_rules, *new))

    def regrouped(self, group_size: int) -> Recipe:
        """This recipe with another group size for everything that is quantised."""

        def regroup(scheme: Scheme) -> Scheme:
            try:
                return replace(scheme, group_size=group_size) if scheme.quantised else scheme
            except ValueError as error:
                raise RecipeError(str(error)) from None

        rules = tuple(replace(rule, scheme=regroup(rule.scheme)) for rule in self.layer_rules)
        return Recipe({part: regroup(scheme) for part, scheme in self.parts.items()}, rules)


def _no_rule(rule: str) -> str:
    """The message for a text that is neither a preset nor a rule."""
    if " " in rule:
        hint = " (rules are separated by commas)"
    else:  # llama.cpp's Q4_K_M is our q4
        hint = did_you_mean(re.sub(r"^(q\d)_.*", r"\1", rule.lower()), PRESETS)
    return (
        f"{rule!r} is not a rule for bits{hint}: write a preset ({', '.join(PRESETS)}, {FIT}) or "
        "rules like experts=3,layers.0-1.experts=8"
    )


@dataclass(frozen=True)
class AskedBits:
    """The options about bits; None for those that were not given."""

    bits: str | None = None
    expert_bits: int | None = None
    dense_bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not isinstance(self.bits, str):
            raise RecipeError(f"bits is {self.bits!r}: write text like 'q4' or 'experts=3'")
        others = (self.expert_bits, self.dense_bits, self.group_size)
        if self.fit and any(other is not None for other in others):
            raise RecipeError(f"{FIT!r} chooses everything: leave the other options on bits out")
        self.on(Recipe())  # raises `RecipeError` now rather than after other work

    @classmethod
    def of(cls, options: LoadOptions) -> AskedBits:
        """What `options` say about bits."""
        return cls(options.bits, options.expert_bits, options.dense_bits, options.group_size)

    @property
    def fit(self) -> bool:
        return self.bits == FIT

    def on(self, base: Recipe) -> Recipe:
        """`base`, changed by the options that were given. Raises `RecipeError`."""
        if self.fit:
            return base
        recipe, group_size = base, 64 if self.group_size is None else self.group_size
        if self.bits is not None:
            recipe = Recipe.parse(self.bits, group_size)
        elif self.group_size is not None:
            recipe = recipe.regrouped(self.group_size)
        for part, given in (("experts", self.expert_bits), ("dense", self.dense_bits)):
            if given is not None:
                recipe = recipe.with_rules(f"{part}={given}", group_size)
        return recipe

    def recipe(self) -> Recipe | None:
        """The recipe for a new pack; None when the one that fits shall be chosen."""
        return None if self.fit else self.on(Recipe())


def most_bits(*conditions: Callable[[Recipe], bool]) -> Recipe:
    """Of `FITTING`, the recipe with the most bits that meets the first condition that any meets.

    If none meets any condition, this is the recipe with the fewest bits.
    """
    recipes = [Recipe.parse(text) for text in FITTING]
    return next(
        (recipe for condition in conditions for recipe in recipes if condition(recipe)),
        recipes[-1],
    )


def bits_name(info: PackInfo) -> str:
    """The preset that a pack was made with, else its rules."""
    return Recipe.parse(info.bits).name
