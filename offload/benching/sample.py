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

from offload.benching.tests import Test
from offload.generation import forward
from offload.handle import offload_of
from offload.stats import Stats


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
    what the model would say.
    """
    tokens = torch.tensor([ids], device=model.device)  # [1, T]
    cache = None
    at, ubatch = test.n_depth, offload_of(model).options.ubatch
    if at:
        _, cache = forward(model, tokens[:, :at], None, ubatch)
    sync(model.device)
    before = offload_of(model).stats()
    ends = [time.perf_counter_ns()]
    if test.n_prompt:
        _, cache = forward(model, tokens[:, at : at + test.n_prompt], cache, ubatch)
        at += test.n_prompt
        sync(model.device)
    ends.append(time.perf_counter_ns())
    for _ in range(test.n_gen):
        _, cache = forward(model, tokens[:, at : at + 1], cache)
        at += 1
        sync(model.device)  # as in use, where the next token depends on this one
        ends.append(time.perf_counter_ns())
    prompt_ns, *token_ns = (end - begin for begin, end in itertools.pairwise(ends))
    experts = offload_of(model).stats() - before
    return Sample(prompt_ns if test.n_prompt else 0, tuple(token_ns), experts)


def sync(device: torch.device) -> None:
    """Return when `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
