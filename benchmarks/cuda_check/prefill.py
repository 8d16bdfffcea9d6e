"""Prefill speed, beside the time in which the experts that are not resident can cross the link.

Knows: how a prompt is timed, which bytes it must move. Does not know: how experts are served.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.cuda_check.bounds import Rates
from benchmarks.cuda_check.decode import prompt_ids
from benchmarks.cuda_check.subject import Subject
from benchmarks.cuda_check.timing import synchronize
from offload.engine.handle import offload_of
from offload.generation.stream import forward

TARGET = 0.85  # of the link bound


@dataclass(frozen=True)
class Prefilled:
    """What came of one prompt."""

    tokens: int
    seconds: float
    loaded_bytes: int
    needed_bytes: int  # of experts that it asked for and that were not resident, at most

    def link_seconds(self, rates: Rates) -> float:
        """The least time at which what was not resident crosses the link."""
        return self.needed_bytes / rates.link / 1e9


def prefill(subject: Subject, tokens: int) -> Prefilled:
    """Read a prompt of `tokens` once; one before it warms up and fills the slots."""
    handle = offload_of(subject.model)
    ids = torch.tensor([prompt_ids(subject, tokens)], device=subject.setting.device)
    forward(subject.model, ids, None)
    synchronize(subject.setting.device)
    info = subject.pack.info
    absent = info.total_experts - min(handle.stats().slots, info.total_experts)
    before, begin = handle.stats(), time.perf_counter()
    forward(subject.model, ids, None)
    synchronize(subject.setting.device)
    seconds = time.perf_counter() - begin
    loaded = (handle.stats() - before).bytes_loaded
    return Prefilled(tokens, seconds, loaded, min(loaded, absent * info.slot_bytes))
