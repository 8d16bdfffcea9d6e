"""One table over several settings: for each the model is loaded anew.

Knows: the order of settings, and that one model is gone before the next comes. Does not know: how a
model is loaded, what is done with a row.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.bench.result import Result
from offload.bench.run_part import run
from offload.bench.subject import Subject
from offload.bench.tests import Test
from offload.budget.budget import parse_slots
from offload.residency import Residency


@dataclass(frozen=True)
class Setting:
    """What a sweep changes, as the flags have it."""

    expert_bits: int | None = None
    expert_slots: str | None = None
    policy: str = "lfru"
    lookahead: bool | None = None


@dataclass(frozen=True)
class Row:
    """A test's figures with what they belong to."""

    subject: Subject
    result: Result

    def to_json(self) -> dict[str, Any]:
        return {**self.subject.to_json(), **self.result.to_json()}


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
Load = Callable[[Setting], AbstractContextManager[Loaded]]


def make_settings(
    expert_bits: Sequence[int | None],
    expert_slots: Sequence[str | None],
    policies: Sequence[str],
    lookaheads: Sequence[bool | None],
) -> list[Setting]:
    """Every combination; the last one named changes first. Raises `OffloadError` for one that
    could not be loaded."""
    for policy in policies:
        Residency(policy)
    for slots in expert_slots:
        parse_slots(slots, 1)
    every = itertools.product(expert_bits, expert_slots, policies, lookaheads)
    return [Setting(*one) for one in every]


def sweep(
    load: Load,
    settings: Sequence[Setting],
    tests: Sequence[Test],
    *,
    repetitions: int = 5,
    warmup: bool = True,
    random: bool = False,
) -> Iterator[Row]:
    """The rows of every setting, each as soon as it is measured."""

    def rows(setting: Setting) -> Iterator[Row]:
        with load(setting) as (model, tokenizer):
            subject = Subject.of(model, random=random)
            for result in run(
                model, tokenizer, tests, repetitions=repetitions, warmup=warmup, random=random
            ):
                yield Row(subject, result)

    for setting in settings:
        yield from rows(setting)
        gc.collect()  # modules and hooks hold each other: two models need not fit
