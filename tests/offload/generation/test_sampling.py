"""Where sampling parameters come from, their ranges, and how they affect the choice of a token."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from offload.errors import GenerationError
from offload.generation.sampler import Sampler
from offload.sampling import Sampling, resolve_sampling

FALLBACK = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)
CPU = torch.device("cpu")
IDS = torch.tensor([[0, 1]])


def _logits(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def _choices(sampling: Sampling, logits: Tensor, count: int = 200) -> list[int]:
    sampler = Sampler(sampling, CPU)
    return [int(sampler(IDS, logits)) for _ in range(count)]


def test_a_checkpoint_that_says_nothing_is_greedy() -> None:
    assert resolve_sampling(None) == Sampling() == resolve_sampling(GenerationConfig())
    assert Sampling().temperature == 0


def test_the_fallback_counts_if_the_checkpoint_says_nothing() -> None:
    assert resolve_sampling(None, fallback=FALLBACK) == FALLBACK
    assert resolve_sampling(GenerationConfig(), fallback=FALLBACK) == FALLBACK


def test_the_checkpoint_has_priority_over_the_fallback() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)
    expected = Sampling(0.6, 20, 0.9, 0.1)
    assert resolve_sampling(config, fallback=FALLBACK) == expected == resolve_sampling(config)


def test_a_sampling_checkpoint_leaves_the_rest_to_transformers_defaults() -> None:
    config = GenerationConfig(do_sample=True)
    assert resolve_sampling(config, fallback=FALLBACK) == Sampling(1.0, 50, 1.0)


def test_a_given_value_has_priority_over_the_checkpoint() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)
    given_ = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.5}
    resolved = resolve_sampling(config, seed=0, fallback=FALLBACK, **given_)
    assert resolved == Sampling(0.0, 0, 1.0, 0.0, 1.5, seed=0)


def test_a_greedy_checkpoint_keeps_its_repetition_penalty() -> None:
    config = GenerationConfig(repetition_penalty=1.3)
    assert resolve_sampling(config) == Sampling(repetition_penalty=1.3)
    assert resolve_sampling(config, fallback=FALLBACK).repetition_penalty == 1.3
    assert resolve_sampling(config, repetition_penalty=1.0).repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_the_error_names_a_value_out_of_range_with_its_range(name: str, value: float) -> None:
    given_: dict[str, Any] = {name: value}
    with pytest.raises(GenerationError, match=rf"{name} is .*: it must be"):
        resolve_sampling(None, **given_)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", [1.0]),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_k", "4"),
        ("top_p", {}),
        ("repetition_penalty", "1"),
        ("seed", 1.0),
    ],
)
def test_the_error_names_a_value_that_is_not_a_number(name: str, value: Any) -> None:
    given_: dict[str, Any] = {name: value}
    with pytest.raises(GenerationError, match=rf"{name} is .*: it must be a (whole )?number"):
        resolve_sampling(None, **given_)


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_infinity_is_out_of_range(name: str) -> None:
    given_: dict[str, Any] = {name: math.inf}
    with pytest.raises(GenerationError, match=f"{name} is inf"):
        resolve_sampling(None, **given_)


@given(
    temperature=st.sampled_from([5e-324, 1e-300, 1e-6, 1e-4, 1.0, 1e38, 1e300, sys.float_info.max]),
    top_k=st.sampled_from([0, 1, 10**30]),
    top_p=st.sampled_from([5e-324, 1e-300, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 1.0]),
)
def test_extreme_parameters_choose_a_possible_token(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampler = Sampler(Sampling(temperature, top_k, top_p, min_p, seed=1), CPU)
    logits = torch.tensor([[1.0, -2.0, 3.0, -math.inf]])
    assert int(sampler(torch.tensor([[0, 1]]), logits)) in range(3)


@pytest.mark.parametrize("penalty", [5e-324, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_makes_logits_infinite_is_an_error(
    penalty: float, temperature: float
) -> None:
    sampler = Sampler(Sampling(temperature, repetition_penalty=penalty), CPU)
    with pytest.raises(GenerationError, match="repetition_penalty nearer to 1"):
        sampler(torch.tensor([[0, 1]]), torch.tensor([[1.0, -2.0, 3.0]]))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 2, 0.9, 0.1)])
@pytest.mark.parametrize(
    "logits",
    [
        [0.0, math.nan, 1.0],
        [math.nan] * 3,
        [0.0, math.inf, 1.0],
        [-math.inf] * 3,
    ],
)
def test_logits_that_are_not_finite_are_an_error(logits: list[float], sampling: Sampling) -> None:
    with pytest.raises(GenerationError, match="the model's logits are not finite"):
        Sampler(sampling, CPU)(IDS, torch.tensor([logits]))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=1.0, min_p=1.0, seed=2**63 - 1),
        Sampling(temperature=2.0, top_p=0.01, seed=0),
        Sampling(temperature=1, top_k=1),
        Sampling(temperature=1, repetition_penalty=2),
        Sampling(temperature=0, repetition_penalty=2),
    ],
)
def test_the_ends_of_the_ranges_and_whole_numbers_can_be_used(sampling: Sampling) -> None:
    assert int(Sampler(sampling, CPU)(IDS, _logits(0.2, 0.3, 0.5))) in range(3)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=50))
def test_greedy_takes_the_largest_logit(values: list[float]) -> None:
    logits = torch.tensor([values])
    token = Sampler(Sampling(), CPU)(torch.tensor([[0]]), logits)
    assert token.shape == (1, 1)
    assert logits[0, token.item()] == logits.max()


def test_a_seed_repeats_its_choices_and_another_does_not() -> None:
    logits = torch.zeros(1, 1000)
    first = _choices(Sampling(temperature=1.0, seed=1), logits, 10)
    assert first == _choices(Sampling(temperature=1.0, seed=1), logits, 10)
    assert first != _choices(Sampling(temperature=1.0, seed=2), logits, 10)


def test_without_a_seed_choices_differ() -> None:
    logits = torch.zeros(1, 1000)
    runs = {tuple(_choices(Sampling(temperature=1.0), logits, 10)) for _ in range(3)}
    assert len(runs) == 3


def test_choices_do_not_touch_torchs_own_random_state() -> None:
    before = torch.get_rng_state()
    _choices(Sampling(temperature=1.0, seed=1), _logits(0.5, 0.5), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_choices_follow_the_probabilities() -> None:
    counts = Counter(_choices(Sampling(temperature=1.0, seed=0), _logits(0.7, 0.2, 0.1), 1000))
    assert counts[0] == pytest.approx(700, abs=60)
    assert counts[2] == pytest.approx(100, abs=40)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=1.0, seed=0), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=2, seed=0), {0, 1}),
        (Sampling(temperature=1.0, top_k=999, seed=0), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_p=0.5, seed=0), {0, 1}),
        (Sampling(temperature=1.0, min_p=0.6, seed=0), {0, 1}),
        (Sampling(temperature=0.01, seed=0), {0}),
    ],
)
def test_filters_leave_the_right_tokens(sampling: Sampling, possible: set[int]) -> None:
    assert set(_choices(sampling, _logits(0.4, 0.3, 0.2, 0.1))) == possible


def test_a_repetition_penalty_keeps_greedy_from_repeating_a_token() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.9]])
    assert int(Sampler(Sampling(repetition_penalty=1.5), CPU)(IDS, logits)) == 2
    assert int(Sampler(Sampling(), CPU)(IDS, logits)) == 0
