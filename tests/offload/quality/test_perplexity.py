"""Perplexity against transformers alone, windows at their limits, and standard errors."""

from __future__ import annotations

import math
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from offload import QualityError, load
from offload.engine.handle import offload_of
from offload.progress import Ticker
from offload.quality.scoring import (
    DECODED,
    Estimate,
    PerplexityResult,
    Sliding,
    Text,
    cut,
    encode_text,
    exp_of,
    mean_of,
    measure_perplexity,
    pieces,
    score,
    tokens_at_once,
)
from tests.conftest import BEGIN, make_tokenizer
from tests.tiny import tiny_config

TEXT = "Every token is scored once, and none of them twice; the window slides over the rest."


@pytest.fixture(scope="module")
def model(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreTrainedModel]:
    """The tiny Mixtral with our experts, unquantised."""
    packs = tmp_path_factory.mktemp("packs")
    loaded, _ = load(mixtral, device="cpu", expert_bits=16, pack_dir=packs)
    yield loaded
    loaded.offload.close()


@pytest.fixture(scope="module")
def plain(mixtral: Path) -> PreTrainedModel:
    """The same checkpoint, run by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(mixtral).eval()


def direct(model: PreTrainedModel, text: Text, window: int, stride: int) -> Estimate:
    """Perplexity by the loop of transformers' guide, one likelihood at a time."""
    room, nll, scored = window - len(text.prefix), [], 0 if text.prefix else 1
    for begin in range(0, len(text.ids), stride):
        end = min(begin + room, len(text.ids))
        row = torch.tensor([[*text.prefix, *text.ids[begin:end]]])
        with torch.no_grad():
            logits = model(row).logits[0].double()
        for at in range(scored, end):
            position = len(text.prefix) + at - begin
            nll.append(-float(logits[position - 1].log_softmax(-1)[row[0, position]]))
        scored = end
        if end == len(text.ids):
            break
    assert len(nll) == text.scored
    mean = math.fsum(nll) / len(nll)
    spread = math.fsum(x * x for x in nll) / len(nll) - mean * mean
    error = math.sqrt(spread / (len(nll) - 1))  # as llama.cpp's perplexity tool
    return Estimate(math.exp(mean), math.exp(mean) * error)


# --- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride"), [(512, 256), (32, 16), (32, 1), (32, 31), (2, 1), (3, 2), (84, 42)]
)
@pytest.mark.parametrize("prefix", [(), (BEGIN,)])
def test_perplexity_agrees_with_transformers(
    window: int, stride: int, prefix: tuple[int, ...], model: PreTrainedModel, plain: Any
) -> None:
    text = Text(prefix, tuple(TEXT.encode()))
    if stride >= window - len(prefix):
        pytest.skip("the prefix leaves no room for such a stride")
    expected = direct(plain, text, window, stride)
    found = measure_perplexity(model, text, Sliding(window, stride))
    assert found.tokens == text.scored
    assert found.perplexity.value == pytest.approx(expected.value, rel=1e-5)
    assert found.perplexity.error == pytest.approx(expected.error, rel=1e-4)


@pytest.mark.parametrize("count", [31, 32, 33, 34, 47, 48, 49])
def test_a_token_more_or_less_than_the_window(count: int, model: Any, plain: Any) -> None:
    text = Text((), tuple(TEXT.encode()[:count]))
    found = measure_perplexity(model, text, Sliding(32, 16))
    assert found.tokens == count - 1
    assert found.perplexity.value == pytest.approx(direct(plain, text, 32, 16).value, rel=1e-5)


@pytest.mark.parametrize("piece", [1, 5, 16, 31])
def test_long_windows_go_in_pieces_with_the_same_result(piece: int, model: Any) -> None:
    text = Text((BEGIN,), tuple(TEXT.encode()))
    sliding = Sliding(40, 13)
    whole = torch.cat([scores.nll for scores in score(model, text, sliding)])
    parts = [scores.nll for scores in score(model, text, sliding, piece=piece, rows=7)]
    assert max(map(len, parts)) <= 7
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_progress_is_reported_up_to_the_end(model: Any) -> None:
    told: list[tuple[int, int]] = []
    text = Text((), tuple(TEXT.encode()))
    measure_perplexity(model, text, Sliding(32, 16), lambda *done: told.append(done))
    assert told == sorted(told)
    assert told[-1] == (text.scored, text.scored)


# --- windows -------------------------------------------------------------------------------------


@given(
    st.integers(2, 300), st.integers(0, 2), st.integers(4, 64), st.integers(1, 64), st.booleans()
)
def test_each_token_is_scored_once_with_enough_before_it(
    total: int, prefix: int, window: int, stride: int, half: bool
) -> None:
    text = Text((0,) * prefix, (1,) * total)
    sliding = Sliding.asked(window, None if half else min(stride, window - prefix - 1))
    if sliding.stride >= window - prefix:
        return
    scored: list[int] = []
    for number, part in enumerate(cut(text, sliding)):
        assert prefix + part.end - part.begin <= window
        assert part.begin < part.scored or prefix
        context = prefix + part.scored - part.begin
        assert number == 0 or context >= window - sliding.stride
        scored += range(part.scored, part.end)
    assert scored == list(range(0 if prefix else 1, total))


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 9), (8, 0), (8, -1)])
def test_impossible_windows_name_the_flag(window: int, stride: int) -> None:
    with pytest.raises(QualityError, match=r"--(ctx-size|stride)"):
        list(cut(Text((), (1,) * 20), Sliding(window, stride)))


# --- texts ---------------------------------------------------------------------------------------


def test_the_tokenizers_prefix_begins_every_window() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", BEGIN), ("<|end|>", BEGIN + 1)]
    )
    assert encode_text(tokenizer, "abc", "it") == Text((BEGIN,), (97, 98, 99))
    assert encode_text(make_tokenizer(), "abc", "it") == Text((), (97, 98, 99))


@pytest.mark.parametrize("text", ["", "a", "ab"])
def test_a_text_of_too_few_tokens_is_refused(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(QualityError, match=rf"the text has {len(text)} tokens?, too few.* 3"):
        encode_text(tokenizer, text, "the text")


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(QualityError, match="no tokenizer"):
        encode_text(None, "abc", "the text")


def test_tokens_the_model_does_not_have_are_refused(model: Any) -> None:
    with pytest.raises(QualityError, match="do not belong together"):
        measure_perplexity(model, Text((), (1, 2, 9999)), Sliding(8, 4))
    with pytest.raises(QualityError, match="do not belong together"):
        measure_perplexity(model, Text((9999,), (1, 2, 3)), Sliding(8, 4))


def test_scores_that_are_not_finite_are_refused(mixtral: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(mixtral)
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(QualityError, match="at scored token 1 is nan"):
        measure_perplexity(broken, Text((), (1, 2, 3, 4)), Sliding(8, 4))


# --- errors --------------------------------------------------------------------------------------


def test_the_error_of_a_mean_by_hand() -> None:
    # mean 3, mean of squares 11, variance 2, over n - 1 = 4
    assert mean_of(torch.tensor([1.0, 2, 3, 4, 5])) == Estimate(3.0, math.sqrt(2 / 4))


def test_the_error_of_a_share_by_hand() -> None:
    assert mean_of(torch.tensor([True, True, True, False])) == Estimate(
        0.75, math.sqrt(0.75 * 0.25 / 3)
    )


def test_the_exponential_scales_the_error() -> None:
    assert exp_of(Estimate(math.log(8), 0.25)).value == pytest.approx(8)
    assert exp_of(Estimate(math.log(8), 0.25)).error == pytest.approx(2)
    assert exp_of(Estimate(1e6, 0.1)).value == math.inf  # not an exception


def test_the_printed_line_is_that_of_llama_cpp() -> None:
    assert str(PerplexityResult(Estimate(math.log(12), 0.01), 99)) == "Perplexity: 12.000 ± 0.120"


def test_progress_is_printed_as_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Ticker("it", every=0.0) as ticker:
        for done in (10, 30, 5):  # a count that falls begins a new measurement
            time.sleep(0.01)
            ticker(done, 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"it: 30 of 100 tokens, \d+ t/s, \d+ s left\n", captured.err)


@pytest.mark.parametrize(
    ("count", "at_once", "expected"),
    [
        (20, 512, [(0, 4)]),
        (50, 16, [(0, 16), (16, 32), (32, 34)]),
        (1040, sys.maxsize, [(0, 1024)]),
    ],
)
def test_the_model_is_called_in_pieces_of_at_most_the_given_size(
    count: int, at_once: int, expected: list[tuple[int, int]]
) -> None:
    singly = [(at, at + 1) for at in range(count - DECODED, count)]
    assert [*pieces(count, at_once)] == [*expected, *singly]


def test_a_model_is_given_at_most_the_tokens_that_its_budget_counts(mixtral_pack: Path) -> None:
    model, _ = load(mixtral_pack, device="cpu", ubatch_size=64)
    assert tokens_at_once(model) == 64
    offload_of(model).close()
    jamba = types.SimpleNamespace(config=tiny_config("jamba"))
    assert tokens_at_once(jamba) == sys.maxsize  # type: ignore[arg-type]
