"""One table over several settings: the model is freed and loaded anew for each."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.bench.result import Rates, Result, Subject, bound_of
from offload.bench.sample import (
    Test,
    forget_peak,
    peak_since,
    random_tokens,
    real_text,
    stretches,
    sync,
    take_sample,
)
from offload.engine.engine import Engine
from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.options import LoadOptions

BLOCK_BYTES = 256 * 2**20  # beyond most caches
ROUNDS = 8


def measure_link(engine: Engine, copies: int = 64) -> float:
    """GB/s of whole records copied back to back: the ceiling that loads stand beside."""
    transfer, layer = engine.transfer, engine.layers[0]
    held = engine.cache.table.key_in(0)
    experts = [i % layer.num_experts for i in range(layer.num_experts + copies)]

    def copy(chosen: list[int]) -> float:
        tickets = [transfer.start(layer.index, expert, 0, urgent=True) for expert in chosen]
        for ticket in tickets:
            transfer.wait(ticket)
        sync(transfer.device)
        return transfer.busy_seconds

    try:
        before = copy(experts[: layer.num_experts])  # the first touch reads the disk, checks sums
        seconds = copy(experts[layer.num_experts :]) - before
    finally:
        if held is not None:
            transfer.wait(transfer.start(*held, 0, urgent=True))
    return copies * engine.record_bytes(layer.index) / 1e9 / seconds


@functools.cache
def measure_memory(device: torch.device) -> float:
    """GB/s at which all of `device`'s compute reads its memory: the best of a few sums."""
    block = torch.ones(BLOCK_BYTES // 4, device=device)
    seconds = []
    for _ in range(ROUNDS):
        sync(device)
        begin = time.perf_counter()
        block.sum()
        sync(device)
        seconds.append(time.perf_counter() - begin)
    return block.nbytes / 1e9 / min(seconds)


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
    check_context(tests, offload_of(model).fit.options.context)
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
    link, devices = measure_link(offload.engine), offload.fit.devices
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


@dataclass(frozen=True)
class Row:
    """A test's figures with what they belong to."""

    subject: Subject
    result: Result

    def to_json(self) -> dict[str, Any]:
        return {**self.subject.to_json(), **self.result.to_json()}


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
Load = Callable[[LoadOptions], AbstractContextManager[Loaded]]


def sweep(
    load: Load,
    settings: Sequence[LoadOptions],
    tests: Sequence[Test],
    *,
    repetitions: int = 5,
    warmup: bool = True,
    random: bool = False,
) -> Iterator[Row]:
    """The rows of every setting, each as soon as it is measured."""

    def rows(setting: LoadOptions) -> Iterator[Row]:
        with load(setting) as (model, tokenizer):
            subject = Subject.of(model, random=random)
            for result in run(
                model, tokenizer, tests, repetitions=repetitions, warmup=warmup, random=random
            ):
                yield Row(subject, result)

    for setting in settings:
        yield from rows(setting)
        gc.collect()  # modules and hooks hold each other: two models need not fit
