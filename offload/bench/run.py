"""Runs the tests of `offload bench`: for each setting the model is loaded, timed and freed."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.bench.row import Bandwidths, BenchRow, bytes_read, row_of, subject_of_rows
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

BLOCK_BYTES = 256 * 2**20  # more than the caches of most processors
ROUNDS = 8

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


def measure_link(engine: Engine, copies: int = 64) -> float:
    """GB/s of whole expert records copied back to back: the most that loads can reach."""
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
        before = copy(experts[: layer.num_experts])  # the first copy of each reads the disk
        seconds = copy(experts[layer.num_experts :]) - before
    finally:
        if held is not None:
            transfer.wait(transfer.start(*held, 0, urgent=True))
    return copies * engine.record_bytes(layer.index) / 1e9 / seconds


@functools.cache
def measure_memory(device: torch.device) -> float:
    """GB/s at which `device` reads its own memory while it computes: the best of a few sums."""
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
) -> Iterator[BenchRow]:
    """Time each test `repetitions` times; yields its row as soon as it is done.

    Each repetition reads its own stretch of text; another call with the same arguments reads the
    same stretches. Raises `GenerationError` if there is no tokenizer for real text.
    """
    if tokenizer is None and not random:
        raise GenerationError("the model has no tokenizer for real text: pass --random")
    count = max(test.context for test in tests) * (repetitions + warmup)
    if random or tokenizer is None:
        ids = random_tokens(model.config.get_text_config().vocab_size, count)
    else:
        ids = real_text(tokenizer, count)
    offload, subject = offload_of(model), subject_of_rows(model, random=random)
    bandwidths = Bandwidths(measure_link(offload.engine), measure_memory(model.device))
    devices = offload.fit.devices
    for test in tests:
        texts = stretches(ids, test.context)
        if warmup:
            take_sample(model, test, next(texts))
        for device in devices:
            forget_peak(device)
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        samples = [take_sample(model, test, next(texts)) for _ in range(repetitions)]
        yield row_of(
            subject,
            test,
            samples,
            bandwidths,
            test_time=when,
            read_bytes=bytes_read(model, test, samples),
            peak_memory=sum(map(peak_since, devices)),
        )


def check_context(tests: Sequence[Test], context: int) -> None:
    """Raise `GenerationError` for tests that do not fit into `context` tokens."""
    longest = max(test.context for test in tests)
    if longest > context:
        raise GenerationError(
            f"a test needs {longest} tokens and the context holds {context}: raise --ctx-size"
        )


def sweep(
    load: Callable[[LoadOptions], AbstractContextManager[Loaded]],
    settings: Sequence[LoadOptions],
    tests: Sequence[Test],
    **options: Any,
) -> Iterator[BenchRow]:
    """The rows of every setting, each as soon as it is measured; `options` are those of `run`."""

    def rows(setting: LoadOptions) -> Iterator[BenchRow]:
        with load(setting) as (model, tokenizer):
            yield from run(model, tokenizer, tests, **options)

    for setting in settings:
        yield from rows(setting)
        gc.collect()  # a model's modules and hooks form cycles, and two models may not fit at once
