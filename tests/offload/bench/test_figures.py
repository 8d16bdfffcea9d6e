"""The tests' names and order, the figures of a row, and the tokens that are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from offload import load
from offload.bench.row import Test, bytes_read, dense_bytes, make_tests, percentiles
from offload.bench.run import random_tokens, real_text, stretches, take_sample
from offload.engine.handle import offload_of
from tests.offload.bench.rows import row


def test_tests_come_in_llama_benchs_order() -> None:
    tests = make_tests([512, 128], [64], [(16, 8)], [0, 32])
    assert [test.name for test in tests] == [
        "pp512", "pp128", "tg64", "pp16+tg8",
        "pp512 @ d32", "pp128 @ d32", "tg64 @ d32", "pp16+tg8 @ d32",
    ]  # fmt: skip


def test_a_test_of_no_tokens_is_left_out() -> None:
    assert make_tests([0], [0], [], [0]) == []
    assert make_tests([0], [4], [], [0]) == [Test(0, 4)]


def test_percentiles_lie_between_values() -> None:
    assert percentiles([1.0]) == (1.0, 1.0, 1.0)
    assert percentiles([3.0, 1.0, 2.0])[0] == 2.0
    assert percentiles([0.0, 10.0]) == pytest.approx((5, 9.5, 9.9))
    assert percentiles([]) == (None, None, None)


def test_the_first_token_takes_the_prompts_time_and_percentiles_are_of_the_decode() -> None:
    both = row(Test(8, 4), token_ms=(10, 10, 10, 50))
    assert both.first_token_ns == 5e6
    assert both.token_p50_ns == 10e6
    assert both.token_p99_ns == pytest.approx(50e6, rel=0.1)
    assert both.samples_ns == (85 * 10**6,) * 2
    assert row(Test(0, 4)).first_token_ns is None
    prefill = row(Test(8, 0))
    assert (prefill.token_p50_ns, prefill.token_p95_ns, prefill.token_p99_ns) == (None,) * 3


def test_the_bound_adds_the_times_of_the_link_and_the_memory() -> None:
    decode = row(Test(0, 4))  # 2 samples of 40 ms that copy 1,000 bytes and read 5 MB each
    seconds = 2000 / 10e9 + 10**7 / 20e9
    assert (decode.link_bytes, decode.read_bytes) == (2000, 10**7)
    assert decode.bound_ts == pytest.approx(8 / seconds)
    assert decode.bound_share == pytest.approx(seconds / 80e-3)
    assert decode.bound_limit == "memory"
    assert decode.link_share == pytest.approx(2000 / 80e-3 / 10e9)


def test_bytes_that_are_read_are_those_of_weights_experts_and_the_kv_cache(
    mixtral_pack: Path,
) -> None:
    model, _ = load(mixtral_pack, device="cpu", expert_slots=6)
    offload = offload_of(model)
    test = Test(4, 2, n_depth=3)
    sample = take_sample(model, test, list(range(9)))
    record = offload.engine.record_bytes(0)
    config = model.config
    kv = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * 4
    calls_read = sum(layer.requests for layer in sample.experts.layers) * record
    counts = sample.experts.counts  # streamed experts of a prompt are read where they are mapped
    assert sample.experts.bytes_copied == (counts.loads - counts.loads_beside) * record > 0
    assert sample.experts.tokens == 6
    assert (
        bytes_read(model, test, [sample]) == 3 * dense_bytes(model) + calls_read + (7 + 8 + 9) * kv
    )
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
