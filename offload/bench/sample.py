"""One timed run of a test.

Knows: the clock, and that a GPU is waited for before it is read. Does not know: how often a test is
run, what its figures mean.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import TokenSource, offload_of
from offload.engine.stats import Stats
from offload.generation.stream import forward, peak_memory
from offload.sampling import Sampling

FORGET = Path("/proc/self/clear_refs")  # "5" sets VmHWM to what is resident now (proc(5))
STATUS = Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Count from here, where the system can do that (Linux, CUDA); else from the start on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            FORGET.write_text("5")


def peak_since(device: torch.device) -> int:
    """Bytes: allocated on a GPU, else resident in this process, mapped files included."""
    if device.type != "cuda":
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = STATUS.read_text().splitlines()
            mark = next(line for line in lines if line.startswith("VmHWM:"))
            return int(mark.split()[1]) * 1024
    return peak_memory(device)


@dataclass(frozen=True)
class Test:
    """Prefill `n_prompt` tokens, then decode `n_gen`, after `n_depth` tokens that are not timed."""

    __test__: ClassVar[bool] = False  # pytest, which looks for this name

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def context(self) -> int:
        """Tokens that the KV cache holds at the end."""
        return self.n_depth + self.tokens


def make_tests(
    prompts: Sequence[int],
    gens: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Test]:
    """At each depth all prefills, all decodes, then both together; lengths of 0 are left out."""
    return [
        Test(prompt, gen, depth)
        for depth in depths
        for prompt, gen in (*((p, 0) for p in prompts), *((0, n) for n in gens), *pairs)
        if prompt or gen
    ]


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
    at, ubatch = test.n_depth, handle.fit.ubatch
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
    answer: TokenSource | None = None
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


def real_text(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` tokens of English: Python's own documentation, which every Python carries."""
    ids: list[int] = []
    for name in sorted(topics.topics):
        ids += tokenizer(topics.topics[name], add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    return (ids * -(-count // len(ids)))[:count]


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """`count` tokens as llama-bench feeds them; they flatter or ruin a cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def stretches(ids: list[int], length: int) -> Iterator[list[int]]:
    """`ids` cut into runs of `length`, over and over.

    Each run of a test reads another one: a cache that has just seen the very text would hit more
    than it does in use.
    """
    count = max(1, len(ids) // length)
    return itertools.cycle([ids[at * length : (at + 1) * length] for at in range(count)])
