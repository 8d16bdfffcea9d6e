"""One timed run of a test, and the tokens that it reads."""

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

FORGET = Path("/proc/self/clear_refs")  # writing "5" sets VmHWM to what is resident now (proc(5))
STATUS = Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Make `peak_since` count from now on. Only Linux and CUDA can; elsewhere this does nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            FORGET.write_text("5")


def peak_since(device: torch.device) -> int:
    """Most bytes since `forget_peak`: allocated on a GPU, or resident in this process.

    Resident memory includes mapped files.
    """
    if device.type != "cuda":
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = STATUS.read_text().splitlines()
            mark = next(line for line in lines if line.startswith("VmHWM:"))
            return int(mark.split()[1]) * 1024
    return peak_memory(device)


@dataclass(frozen=True)
class Test:
    """Prefill `n_prompt` tokens, then decode `n_gen`, after `n_depth` tokens that are not timed."""

    __test__: ClassVar[bool] = False  # this is not a class of pytest's, whatever its name says

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """The name that llama-bench gives it, like `pp512` or `tg128 @ d16`."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def context(self) -> int:
        """Tokens that the KV cache holds after a run."""
        return self.n_depth + self.tokens


def make_tests(
    prompts: Sequence[int],
    gens: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Test]:
    """At each depth all prefills, then all decodes, then the pairs.

    A test of no tokens is left out.
    """
    return [
        Test(prompt, gen, depth)
        for depth in depths
        for prompt, gen in (*((p, 0) for p in prompts), *((0, n) for n in gens), *pairs)
        if prompt or gen
    ]


GREEDY = Sampling()


@dataclass(frozen=True)
class Sample:
    """How long each part of a run took, and what the experts did in it."""

    prompt_ns: int  # until the logits of the first new token; 0 if there is no prompt
    token_ns: tuple[int, ...]  # one for each decoded token
    experts: Stats

    @property
    def ns(self) -> int:
        """Time of the whole run."""
        return self.prompt_ns + sum(self.token_ns)


def take_sample(model: PreTrainedModel, test: Test, ids: list[int]) -> Sample:
    """Run `test` once over the tokens `ids`.

    A decode reads the given tokens one by one, so that routing follows real text and does not
    depend on what the model would say. With `--engine device` steps are queued before their tokens
    are known: there the model reads its own greedy choices, after at least one given token.
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
        answer()  # the token that the prompt's logits give; this also queues the next step
    ends.append(time.perf_counter_ns())
    for _ in range(test.n_gen):
        if answer is not None:
            answer()  # returns when the next token has arrived
        else:
            _, cache = forward(model, tokens[:, at : at + 1], cache)
            at += 1
            sync(model.device)  # as in real use, where the next token depends on this one
        ends.append(time.perf_counter_ns())
    prompt_ns, *token_ns = (end - begin for begin, end in itertools.pairwise(ends))
    experts = handle.stats() - before
    return Sample(prompt_ns if test.n_prompt else 0, tuple(token_ns), experts)


def sync(device: torch.device) -> None:
    """Wait until `device` has finished all work that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def real_text(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` tokens of English, from the documentation that comes with every Python."""
    ids: list[int] = []
    for name in sorted(topics.topics):
        ids += tokenizer(topics.topics[name], add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    return (ids * -(-count // len(ids)))[:count]


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """`count` tokens drawn uniformly, as llama-bench does.

    An expert cache does better or worse with them than with text.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def stretches(ids: list[int], length: int) -> Iterator[list[int]]:
    """Stretches of `length` tokens from `ids`, one after another and then again from the start.

    Each run of a test reads the next stretch: an expert cache that has just seen the same text
    would have more hits than in real use.
    """
    count = max(1, len(ids) // length)
    return itertools.cycle([ids[at * length : (at + 1) * length] for at in range(count)])
