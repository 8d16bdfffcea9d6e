"""Running tests on a loaded model.

Knows: warm-up, repetitions, which tokens each run reads. Does not know: how one is timed
(`sample`), how models are loaded (`sweep`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.bench.bound import Rates, bound_of
from offload.bench.peak import forget_peak, peak_since
from offload.bench.rates import measure_link, measure_memory
from offload.bench.result import Result
from offload.bench.sample import take_sample
from offload.bench.tests import Test
from offload.bench.texts import random_tokens, real_text, stretches
from offload.engine.handle import offload_of
from offload.errors import GenerationError


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tests: Sequence[Test],
    *,
    repetitions: int = 5,
    warmup: bool = True,
    random: bool = False,
) -> Iterator[Result]:
    """Time each test `repetitions` times; yields a result as soon as a test is done.

    Each repetition reads a stretch of text of its own, and with other settings the same ones
    again. Raises `GenerationError` before the first.
    """
    check_context(tests, offload_of(model).options.context)
    if tokenizer is None and not random:
        raise GenerationError("the model has no tokenizer for real text: pass --random")
    count = max(test.context for test in tests) * (repetitions + warmup)
    if random or tokenizer is None:
        ids = random_tokens(model.config.get_text_config().vocab_size, count)
    else:
        ids = real_text(tokenizer, count)
    return _run(model, tests, ids, repetitions, warmup)


def check_context(tests: Sequence[Test], context: int) -> None:
    """Raise `GenerationError` for tests that do not fit into `context` tokens."""
    longest = max(test.context for test in tests)
    if longest > context:
        raise GenerationError(
            f"a test needs {longest} tokens of context, it holds {context}: raise --ctx-size"
        )


def _run(
    model: PreTrainedModel, tests: Sequence[Test], ids: list[int], repetitions: int, warmup: bool
) -> Iterator[Result]:
    offload = offload_of(model)
    link, devices = measure_link(offload.engine), offload.options.devices
    rates = Rates(link, measure_memory(model.device))
    for test in tests:
        texts = stretches(ids, test.context)
        if warmup:
            take_sample(model, test, next(texts))
        for device in devices:
            forget_peak(device)
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        samples = tuple(take_sample(model, test, next(texts)) for _ in range(repetitions))
        yield Result(
            test=test,
            test_time=when,
            samples=samples,
            bound=bound_of(model, test, samples, rates),
            peak_memory=sum(map(peak_since, devices)),
        )
