"""Tests' names and order, what follows from samples, bounds, the texts that are read."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from offload.quant.errors import OffloadError
from transformers import PreTrainedTokenizerBase

from offload import load
from offload.bench.command import SWEPT
from offload.bench.result import Bound, Rates, bound_of, dense_bytes, percentile
from offload.bench.sample import Test, make_tests, random_tokens, real_text, stretches, take_sample
from offload.engine.handle import offload_of
from offload.options import LoadOptions, combinations
from tests.offload.bench.rows import row


def test_tests_come_in_llama_benchs_order() -> None:
    tests = make_tests([512, 128], [64], [(16, 8)], [0, 32])
    assert [test.name for test in tests] == [
        "pp512", "pp128", "tg64", "pp16+tg8",
        "pp512 @ d32", "pp128 @ d32", "tg64 @ d32", "pp16+tg8 @ d32",
    ]  # fmt: skip


def test_lengths_of_nothing_are_no_tests() -> None:
    assert make_tests([0], [0], [], [0]) == []
    assert make_tests([0], [4], [], [0]) == [Test(0, 4)]


def test_a_sweep_is_every_combination_the_last_changes_first() -> None:
    given = Namespace(expert_bits=[8, 4], expert_slots=["25%"], policy=["lru", "lfru"], context=77)
    assert combinations(given, SWEPT) == [
        LoadOptions(expert_bits=bits, expert_slots="25%", policy=policy, context=77)
        for bits in (8, 4)
        for policy in ("lru", "lfru")
    ]


@pytest.mark.parametrize(("slots", "policy"), [("many", "lru"), ("25%", "best")])
def test_a_sweep_refuses_at_once_what_could_not_be_loaded(slots: str, policy: str) -> None:
    with pytest.raises(OffloadError):
        combinations(Namespace(expert_slots=["25%", slots], policy=["lru", policy]), SWEPT)


def test_percentiles_lie_between_values() -> None:
    assert percentile([1.0], 99) == 1.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)


def test_the_first_token_is_the_prompts_time_and_percentiles_are_the_decodes() -> None:
    both = row(Test(8, 4), token_ms=(10, 10, 10, 50)).result
    assert both.first_token_ns == 5e6
    assert both.token_ns[50] == 10e6
    assert both.token_ns[99] == pytest.approx(50e6, rel=0.1)
    assert both.samples_ns == (85 * 10**6,) * 2
    assert row(Test(0, 4)).result.first_token_ns is None
    assert row(Test(8, 0)).result.token_ns == {50: None, 95: None, 99: None}


def test_the_bound_adds_what_the_link_and_the_memory_need() -> None:
    bound = Bound(tokens=4, link_bytes=10**9, read_bytes=10**10, rates=Rates(10.0, 50.0))
    assert (bound.link_seconds, bound.memory_seconds) == (0.1, 0.2)
    assert bound.tokens_per_s == pytest.approx(4 / 0.3)
    assert bound.limited_by == "memory"
    result = row(Test(0, 4)).result  # 2 samples of 40 ms; 0.1 ms of copies and 0.5 ms of reading
    assert result.bound_share == pytest.approx(0.6 / 80)


def test_bytes_of_the_bound_are_those_of_weights_experts_and_the_cache(mixtral_pack: Path) -> None:
    model, _ = load(mixtral_pack, device="cpu", expert_slots=6)
    offload = offload_of(model)
    test = Test(4, 2, n_depth=3)
    sample = take_sample(model, test, list(range(9)))
    bound = bound_of(model, test, (sample,), Rates(1.0, 1.0))
    record = offload.engine.record_bytes(0)
    config = model.config
    kv = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * 4
    calls_read = sum(layer.requests for layer in sample.experts.layers) * record
    counts = sample.experts.counts  # a prompt's streamed experts are read where they are mapped
    assert bound.link_bytes == (counts.loads - counts.loads_beside) * record > 0
    assert bound.read_bytes == 3 * dense_bytes(model) + calls_read + (7 + 8 + 9) * kv
    table = model.get_input_embeddings().weight.nbytes
    parameters = sum(p.nbytes for p in model.parameters())
    tied = config.tie_word_embeddings
    assert dense_bytes(model) == pytest.approx(parameters - (0 if tied else table), rel=0.01)
    model.offload.close()


def test_no_two_repetitions_read_the_same_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = real_text(tokenizer, 100)
    texts = stretches(ids, 30)
    first, second, third, again = (next(texts) for _ in range(4))
    assert [*first, *second, *third] == ids[:90]
    assert again == first
    assert random_tokens(10, 5) == random_tokens(10, 5)
