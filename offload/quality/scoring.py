"""Scoring a text: every token's distribution given the tokens before it, in a sliding window.

Knows: tokens, windows, how much is computed at a time. Does not know: what the scores are for, nor
experts; any causal model of transformers will do.

Letters: N tokens of the text, T of one window, n of one slice, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.errors import QualityError
from offload.units import READ_WHOLE


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean_of(samples: Tensor) -> Estimate:
    """The mean of `samples` [n], n > 1: its error is sqrt((E[x^2] - E[x]^2) / (n - 1)).

    As llama.cpp's perplexity tool has it (`mean_and_uncertainty`): the samples count as
    independent, which neighbouring tokens are not quite.
    """
    values = samples.double()
    variance = float(values.var(correction=0))
    return Estimate(float(values.mean()), math.sqrt(variance / (len(values) - 1)))


def share_of(hits: Tensor) -> Estimate:
    """The share p of true `hits` [n], n > 1: its error is sqrt(p (1 - p) / (n - 1))."""
    share = float(hits.double().mean())
    return Estimate(share, math.sqrt(share * (1 - share) / (len(hits) - 1)))


def exp_of(estimate: Estimate) -> Estimate:
    """The exponential: |d exp(x) / dx| = exp(x) carries the error over (first order)."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf  # 1.8e308 is exp(709.8)
    return Estimate(value, value * estimate.error)


WINDOW = 512  # tokens, as llama.cpp's perplexity tool; half of them are context by default
DECODED = 16  # tokens at a window's end given singly: other kernels compute those
PIECE = 512  # tokens given to the model at once: bounds the logits [PIECE, V] of long windows
SLICE = 64  # rows whose logits are widened to float32 at once


@dataclass(frozen=True)
class Text:
    """A text as tokens. `prefix` is what its tokenizer puts before every text, such as BOS."""

    prefix: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def scored(self) -> int:
        """Tokens that have something before them."""
        return len(self.ids) if self.prefix else max(0, len(self.ids) - 1)


@dataclass(frozen=True)
class Sliding:
    """How a text is cut: windows of `window` tokens that begin `stride` tokens apart."""

    window: int
    stride: int

    @classmethod
    def asked(cls, window: int = WINDOW, stride: int | None = None) -> Sliding:
        """With the default stride, half a window, when None is given."""
        return cls(window, max(1, window // 2) if stride is None else stride)


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of the text, of which those from `scored` on are new."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True)
class Scores:
    """Some tokens that follow each other, and what was expected in their places."""

    targets: Tensor  # [n]
    log_probs: Tensor  # [n, V] float32

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the targets in nats: [n] float64 on the CPU."""
        picked = self.log_probs.gather(1, self.targets[:, None]).squeeze(1)
        return -picked.double().cpu()  # sync: the scores of a slice are done


def encode_text(tokenizer: PreTrainedTokenizerBase | None, text: str, name: str) -> Text:
    """`text`, called `name` in errors, as tokens, with what its tokenizer puts before it."""
    if tokenizer is None:
        raise QualityError(
            "the model has no tokenizer: put tokenizer.json and tokenizer_config.json into its "
            "folder"
        )
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    encoded = Text(prefix_of(tokenizer), ids)
    if encoded.scored < 2:  # one score has no standard error
        raise QualityError(
            f"{name} has {len(ids)} token{'s' * (len(ids) != 1)}, too few to measure: give at "
            f"least {2 if encoded.prefix else 3}"
        )
    return encoded


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What `tokenizer` puts before a text."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            return tuple(full[:begin])
    return ()


def cut(text: Text, sliding: Sliding) -> Iterator[Window]:
    """The windows over `text`: each token is scored once, after the first window with at least
    window - stride tokens before it, the prefix among them.

    Raises `QualityError` when window and stride do not allow that.
    """
    room = sliding.window - len(text.prefix)
    if room < 2:
        raise QualityError(
            f"a window of {sliding.window} tokens is too short: raise --ctx-size to at least "
            f"{len(text.prefix) + 2}"
        )
    if not 1 <= sliding.stride < room:
        raise QualityError(
            f"the stride is {sliding.stride}: give --stride at least 1 and at most {room - 1} with "
            f"a window of {sliding.window} tokens"
        )
    scored = 0 if text.prefix else 1
    for begin in range(0, len(text.ids), sliding.stride):
        end = min(begin + room, len(text.ids))
        yield Window(begin, end, scored)
        if end == len(text.ids):
            return
        scored = end


def score(model: PreTrainedModel, text: Text, sliding: Sliding) -> Iterator[Scores]:
    """The scores of `text`, in the order of its tokens, at most `SLICE` at a time.

    Raises `QualityError` when the text has tokens that the model does not know.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if min(text.ids) < 0 or max(text.ids) >= vocabulary:
        raise QualityError(
            f"the text has a token outside the model's {vocabulary}: tokenizer and model do not "
            "belong together"
        )
    at_once = _at_once(model)
    for window in cut(text, sliding):
        row = text.prefix + text.ids[window.begin : window.end]
        ids = torch.tensor([row], device=model.device)  # [1, T]
        first = len(text.prefix) + window.scored - window.begin  # of `row`, to be scored
        cache = None
        asked = len(row) - 1  # nothing is asked about what follows the last
        for begin, end in _pieces(asked, at_once):
            keep = end - max(begin, first - 1)  # logits at i are about token i + 1
            logits, cache = _forward(model, ids[:, begin:end], cache, max(1, keep))
            for at in range(end - keep, end, SLICE):  # none when keep < 1
                stop = min(at + SLICE, end)
                some = logits[at - end : stop - end or None].float()
                yield Scores(ids[0, at + 1 : stop + 1], some.log_softmax(-1))


def _at_once(model: PreTrainedModel) -> int:
    """Tokens given to `model` at once: no more than its memory is counted for. All, to those whose
    states forget what was before when several tokens follow others."""
    if model.config.get_text_config().model_type in READ_WHOLE:
        return sys.maxsize
    handle = getattr(model, "offload", None)  # transformers' own has none
    return PIECE if handle is None else min(PIECE, handle.options.ubatch)


def _pieces(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what is given to the model at once: prefill, then the last ones singly."""
    bulk = max(0, count - DECODED)
    for begin in range(0, bulk, at_once):
        yield begin, min(begin + at_once, bulk)
    for begin in range(bulk, count):
        yield begin, begin + 1


@torch.inference_mode()
def _forward(model: PreTrainedModel, ids: Tensor, cache: Any, keep: int) -> tuple[Tensor, Any]:
    """The last `keep` tokens' logits [keep, V], and the KV cache."""
    out = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=keep)
    return out.logits[0], out.cache


Report = Callable[[int, int], None]  # tokens scored, tokens to score


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` scored tokens."""

    nll: Estimate  # nats a token
    tokens: int

    @property
    def perplexity(self) -> Estimate:
        return exp_of(self.nll)

    def __str__(self) -> str:
        return f"Perplexity: {self.perplexity}"


def measure_perplexity(
    model: PreTrainedModel, text: Text, sliding: Sliding, report: Report | None = None
) -> Perplexity:
    """Perplexity of `model` on `text`; `report` is told how far it is.

    Error of the mean of the n log-likelihoods sqrt((E[x^2] - E[x]^2) / (n - 1)), times the
    perplexity: as llama.cpp's perplexity tool prints it. Raises `QualityError`.
    """
    samples: list[Tensor] = []
    done = 0
    for scores in score(model, text, sliding):
        samples.append(finite(scores.nll, done, "the negative log-likelihood"))
        done += len(samples[-1])
        if report is not None:
            report(done, text.scored)
    return Perplexity(mean_of(torch.cat(samples)), done)


def finite(values: Tensor, at: int, what: str) -> Tensor:
    """`values` [n] if all are finite; else `QualityError`. `at`: tokens scored before."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise QualityError(
            f"{what} at scored token {at + index + 1} is {float(values[index])}: weights are "
            "damaged or overflow in this dtype; remake the pack"
        )
    return values
