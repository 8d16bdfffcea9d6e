"""One timed run of a test.

Knows: the clock, and that a GPU is waited for before it is read. Does not know: how often a test is
run, what its figures mean.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from offload.bench.tests import Test
from offload.engine.handle import Answer, offload_of
from offload.engine.stats import Stats
from offload.generation.stream import forward
from offload.sampling import Sampling

GREEDY = Sampling()


@dataclass(frozen=True)
class Sample:
    """When each part of a run was over, and what the experts did in it."""

    prompt_ns: int  # until the logits of the first new token; 0 where nothing was prefilled
    token_ns: tuple[int, ...]  # of each decoded token
    experts: Stats

    @property
    def ns(self) -> int:
        return self.prompt_ns + sum(self.token_ns)


def take_sample(model: PreTrainedModel, test: Test, ids: list[int]) -> Sample:
    """Run `test` once over the tokens `ids`.

    Decoding is fed the text token by token, so that routing follows text and does not depend on
    what the model would say. Only where steps are queued before their tokens are read (`--engine
    device`) it goes on with its own greedy choices, after one token of text at least.
    """
    handle = offload_of(model)
    tokens = torch.tensor([ids], device=model.device)  # [1, T]
    at, ubatch = test.n_depth, handle.options.ubatch
    if not at and not test.n_prompt and handle.decoding is not None:
        at = 1
    logits, cache = forward(model, tokens[:, :at], None, ubatch) if at else (None, None)
    sync(model.device)
    before = handle.stats()
    ends = [time.perf_counter_ns()]
    if test.n_prompt:
        logits, cache = forward(model, tokens[:, at : at + test.n_prompt], cache, ubatch)
        at += test.n_prompt
        sync(model.device)
    answer: Answer | None = None
    if test.n_gen and handle.decoding is not None:
        assert logits is not None
        limit = test.n_gen + 1
        answer = handle.decoding.begin(
            model, tokens[:, :at], logits, cache, GREEDY, limit, at + limit, frozenset()
        )
    if answer is not None:
        answer()  # what the prompt's own logits say; the next step is queued
    ends.append(time.perf_counter_ns())
    for _ in range(test.n_gen):
        if answer is not None:
            answer()  # returns when the token is here
        else:
            _, cache = forward(model, tokens[:, at : at + 1], cache)
            at += 1
            sync(model.device)  # as in use, where the next token depends on this one
        ends.append(time.perf_counter_ns())
    prompt_ns, *token_ns = (end - begin for begin, end in itertools.pairwise(ends))
    experts = handle.stats() - before
    return Sample(prompt_ns if test.n_prompt else 0, tuple(token_ns), experts)


def sync(device: torch.device) -> None:
    """Return when `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
