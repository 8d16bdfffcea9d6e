"""Rules for bits have the meaning they should, survive being written as text, or are refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import RecipeError
from offload.pack.recipe import DENSE, FIT, FITTING, PARTS, PRESETS, AskedBits, Recipe, most_bits
from offload.quant.scheme import BITS, GROUP_SIZES, SCALE_BITS, Scheme

schemes = st.builds(
    Scheme, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.sampled_from(SCALE_BITS)
)
rules = st.tuples(
    st.sampled_from(["", "layers.0.", "layers.2-5.", "layers.0-99."]),
    st.sampled_from((*PARTS, "dense")),
    schemes,
).map(lambda rule: f"{rule[0]}{rule[1]}={rule[2]}")


def test_by_default_experts_have_four_bits_and_the_rest_is_as_stored() -> None:
    recipe = AskedBits().recipe()
    assert recipe is not None
    assert recipe.scheme("experts", 3) == Scheme(4, 64)
    assert not any(recipe.scheme(part, 3).quantised for part in PARTS[1:])
    assert str(recipe) == "experts=4g64"


def test_the_example_of_the_help() -> None:
    recipe = Recipe.parse("experts=3,attention=4,layers.0-1.experts=8")
    assert [recipe.scheme("experts", layer).bits for layer in range(4)] == [8, 8, 3, 3]
    assert [recipe.scheme("attention", layer).bits for layer in range(4)] == [4] * 4
    assert recipe.scheme("shared", 0).bits == 16


@given(st.lists(rules, min_size=1, max_size=8))
def test_text_of_a_recipe_reads_back_as_the_recipe(given_rules: list[str]) -> None:
    recipe = Recipe.parse(",".join(given_rules))
    assert Recipe.parse(str(recipe)) == recipe


@given(st.lists(rules, min_size=1, max_size=8), st.sampled_from(PARTS), st.integers(0, 9))
def test_the_last_rule_that_fits_wins(given_rules: list[str], part: str, layer: int) -> None:
    expected = Recipe().parts[part]
    for rule in given_rules:
        selector, _, text = rule.partition("=")
        where, _, name = selector.rpartition(".")
        first, _, last = where.removeprefix("layers.").partition("-")
        here = not where or int(first) <= layer <= int(last or first)
        if here and (name == part or (name == "dense" and part in DENSE)):
            expected = Scheme.parse(text)
    assert Recipe.parse(",".join(given_rules)).scheme(part, layer) == expected


def test_a_preset_can_be_refined() -> None:
    recipe = Recipe.parse("q4,layers.0.experts=8,head=8")
    assert recipe.scheme("experts", 0).bits == 8
    assert recipe.scheme("experts", 1).bits == 4
    assert recipe.scheme("head", None).bits == 8


def test_experts_keep_four_bits_when_only_the_rest_is_named() -> None:
    assert str(Recipe.parse("attention=8")) == "experts=4g64,attention=8g64"
    assert str(Recipe.parse("experts=16,attention=8")) == "experts=16,attention=8g64"


def test_a_preset_is_called_by_its_name() -> None:
    assert Recipe.parse("experts=4,dense=6").name == "q4"
    assert Recipe.parse("experts=4,dense=5").name != "q4"


def test_the_preset_of_mixtral_offloading_is_as_published() -> None:
    """2-bit experts in groups of 16, 4-bit attention in groups of 64, 8-bit scales and zeros."""
    recipe = Recipe.parse("mixtral-offloading")
    assert recipe.scheme("experts", 0) == Scheme(2, 16, 8)
    assert recipe.scheme("attention", 0) == Scheme(4, 64, 8)
    assert not recipe.scheme("head", None).quantised


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_quantises_experts(preset: str) -> None:
    assert Recipe.parse(preset).scheme("experts", 0).quantised


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (AskedBits(expert_bits=8), "experts=8g64"),
        (AskedBits(expert_bits=3, dense_bits=4, group_size=32), None),
        (AskedBits(group_size=32), "experts=4g32"),
        (AskedBits("q8", group_size=128, expert_bits=4), None),
        (AskedBits(expert_bits=16), "experts=16"),
    ],
)
def test_flags_are_shorthand_for_rules(asked: AskedBits, text: str | None) -> None:
    recipe = asked.recipe()
    assert recipe is not None
    if text is not None:
        assert str(recipe) == text
    group = asked.group_size or 64
    for part in ("experts", "attention"):
        scheme = recipe.scheme(part, 0)
        assert not scheme.quantised or scheme.group_size == group


asked_bits = st.sampled_from((None, *BITS))


@given(asked_bits, asked_bits, st.sampled_from((None, *GROUP_SIZES)))
def test_whatever_is_asked_for_comes_back_from_a_packs_text(
    experts: int | None, dense: int | None, group_size: int | None
) -> None:
    """Otherwise the pack could be made, but not loaded with the same options again."""
    asked = AskedBits(None, experts, dense, group_size)
    made = asked.recipe()
    assert made is not None
    assert Recipe.parse(str(made)) == made
    assert asked.on(Recipe.parse(str(made))) == made


def test_without_options_a_recipe_stays_as_it_is() -> None:
    made = Recipe.parse("q5,layers.1.experts=2g16s8")
    assert AskedBits().on(made) == made
    assert AskedBits(expert_bits=5).on(made) != made  # its second layer has 2


NO_RULES = (
    *("", "q7", "experts", "experts=", "experts=7", "experts=4g48", "experts=4s4", "x=4", "=4"),
    *(
        "experts=16g64",
        "experts=16s8",
        "experts=016g64",
        "layers.1-0.experts=4",
        "layers.a.experts=4",
        "experts=4,,",
        "experts=4x",
        "fit,q4",
    ),
)


@pytest.mark.parametrize("text", NO_RULES)
def test_a_text_that_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(text)


@pytest.mark.parametrize("bits", [None, "q4"])
def test_a_group_of_no_weights_is_refused(bits: str | None) -> None:
    with pytest.raises(RecipeError, match="group size must be"):
        AskedBits(bits, group_size=0)


def test_fit_cannot_be_combined_with_other_options() -> None:
    assert AskedBits(FIT).recipe() is None
    with pytest.raises(RecipeError, match="leave the other options"):
        AskedBits(FIT, expert_bits=4)


def test_most_bits_that_meet_the_first_condition_that_can_be_met() -> None:
    chosen = most_bits(lambda recipe: recipe.scheme("experts", 0).bits <= 5)
    assert chosen == Recipe.parse("q5")
    never = lambda recipe: False  # noqa: E731
    assert most_bits(never, lambda recipe: recipe == Recipe.parse("q4")) == Recipe.parse("q4")
    assert most_bits(never, never) == Recipe.parse(FITTING[-1])


def test_fitting_goes_from_many_bits_to_few() -> None:
    bits = [Recipe.parse(text).scheme("experts", 0).bits for text in FITTING]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("expert=4", "did you mean experts?"),
        ("Q4_K_M", "did you mean q4?"),
        ("experts=4 attention=8", "rules are separated by commas"),
        ("norm=4", "the parts are experts, attention, shared, mlp, head, embeddings"),
    ],
)
def test_a_message_names_what_was_probably_meant(text: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(hint)):
        Recipe.parse(text)


def test_a_number_is_no_rule() -> None:
    with pytest.raises(RecipeError, match="write text like"):
        AskedBits(4)  # type: ignore[arg-type]
