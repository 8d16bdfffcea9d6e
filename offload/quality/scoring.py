"""A text is scored in a sliding window: every token's distribution given the tokens before it.

Letters: T tokens of one window, n tokens of one slice, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.errors import QualityError
from offload.generation.rope import whole_length
from offload.units import READ_WHOLE


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean_of(samples: Tensor) -> Estimate:
    """The mean of `samples` [n], n > 1, with the error sqrt((E[x^2] - E[x]^2) / (n - 1)).

    This is `mean_and_uncertainty` of llama.cpp's perplexity tool. It treats the samples as
    independent, although neighbouring tokens are not quite. The mean of booleans is the share p of
    true ones, with the error sqrt(p (1 - p) / (n - 1)).
    """
    values = samples.double()
    variance = float(values.var(correction=0))
    return Estimate(float(values.mean()), math.sqrt(variance / (len(values) - 1)))


def exp_of(estimate: Estimate) -> Estimate:
    """The exponential of `estimate`; to first order, its error is multiplied by exp(x)."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf  # 1.8e308 is exp(709.8)
    return Estimate(value, value * estimate.error)


WINDOW = 512  # tokens, as in llama.cpp's perplexity tool; half of them are context by default
DECODED = 16  # tokens at a window's end that are given one by one, so that decode kernels run too
PIECE = 512  # tokens given to the model at once, which bounds the logits [PIECE, V]
SLICE = 64  # rows of logits that are converted to float32 at once

Report = Callable[[int, int], None]  # tokens scored, tokens to score


@dataclass(frozen=True)
class Text:
    """A text as token ids; its tokenizer puts `prefix`, such as BOS, before every text."""

    prefix: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def scored(self) -> int:
        """Number of scored tokens: those with at least one token before them."""
        return len(self.ids) if self.prefix else max(0, len(self.ids) - 1)


@dataclass(frozen=True)
class Sliding:
    """How a text is cut into windows of `window` tokens that begin `stride` tokens apart."""

    window: int
    stride: int

    @classmethod
    def asked(cls, window: int = WINDOW, stride: int | None = None) -> Sliding:
        """The given window and stride; None stands for a stride of half a window.

        Raises `QualityError`.
        """
        if window < 1:
            raise QualityError("a window of 0 tokens scores nothing: raise --ctx-size")
        return cls(window, max(1, window // 2) if stride is None else stride)


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of the text, of which the ones from `scored` on are scored."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True)
class Scores:
    """Consecutive tokens of a text, and the distributions that the model predicted for them."""

    targets: Tensor  # [n]
    log_probs: Tensor  # [n, V] float32

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the targets in nats: [n] float64 on the CPU."""
        picked = self.log_probs.gather(1, self.targets[:, None]).squeeze(1)
        return -picked.double().cpu()  # sync: scores are collected on the host


def encode_text(tokenizer: PreTrainedTokenizerBase | None, text: str, name: str) -> Text:
    """Encode `text`, together with the prefix of its tokenizer.

    Raises `QualityError`, which calls the text `name`, if it has too few tokens to be measured.
    """
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
    """The ids that `tokenizer` puts before every text."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            return tuple(full[:begin])
    return ()


def cut(text: Text, sliding: Sliding) -> Iterator[Window]:
    """Cut `text` into windows that score each token once.

    In every window after the first, a scored token has at least window - stride tokens before it,
    the prefix included. Raises `QualityError` if window and stride do not allow that.
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


@torch.inference_mode()
def score(
    model: PreTrainedModel, text: Text, sliding: Sliding, piece: int = PIECE, rows: int = SLICE
) -> Iterator[Scores]:
    """Yield the scores of `text` in the order of its tokens, at most `rows` at a time.

    The model is given at most `piece` tokens at once. Raises `QualityError` if the text has a
    token outside the model's vocabulary.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if not all(0 <= token < vocabulary for token in text.prefix + text.ids):
        raise QualityError(
            f"the text has a token outside the model's {vocabulary}: tokenizer and model do not "
            "belong together"
        )
    at_once = tokens_at_once(model, piece)
    for window in cut(text, sliding):
        row = text.prefix + text.ids[window.begin : window.end]
        ids = torch.tensor([row], device=model.device)  # [1, T]
        first = len(text.prefix) + window.scored - window.begin  # index in `row`: first scored
        cache: Any = None
        # The last token is not read, because the token after it is not scored.
        for begin, end in pieces(len(row) - 1, at_once):
            keep = end - max(begin, first - 1)  # the logits at i predict token i + 1
            with whole_length(len(row) - 1):
                out = model(
                    input_ids=ids[:, begin:end],
                    cache=cache,
                    use_cache=True,
                    logits_to_keep=max(1, keep),
                )
            cache = out.cache
            for at in range(end - keep, end, rows):  # empty if keep < 1
                stop = min(at + rows, end)
                some = out.logits[0, at - end : stop - end or None].float()
                yield Scores(ids[0, at + 1 : stop + 1], some.log_softmax(-1))


def score_all(
    model: PreTrainedModel, texts: Sequence[Text], sliding: Sliding, report: Report | None
) -> Iterator[tuple[int, int, Scores]]:
    """Yield the scores of `texts`, with the index of the text and how many tokens came before.

    `report` is called with the progress. Raises `QualityError`.
    """
    total, done = sum(text.scored for text in texts), 0
    for index, text in enumerate(texts):
        for scores in score(model, text, sliding):
            yield index, done, scores
            done += len(scores.targets)
            if report is not None:
                report(done, total)


def tokens_at_once(model: PreTrainedModel, piece: int = PIECE) -> int:
    """How many tokens `model` is given at once: at most `piece` and its micro-batch.

    A model whose states are lost when several tokens follow others is given the whole window.
    """
    if model.config.get_text_config().model_type in READ_WHOLE:
        return sys.maxsize
    handle = getattr(model, "offload", None)  # a model run by transformers alone has none
    return piece if handle is None else min(piece, handle.fit.ubatch)


def pieces(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each call of the model: a prefill in pieces, then the last tokens singly."""
    bulk = max(0, count - DECODED)
    return pairwise([*range(0, bulk, at_once), *range(bulk, count + 1)])


@dataclass(frozen=True)
class PerplexityResult:
    """The exponential of the mean negative log-likelihood of `tokens` scored tokens."""

    nll: Estimate  # nats per token
    tokens: int

    @property
    def perplexity(self) -> Estimate:
        return exp_of(self.nll)

    def __str__(self) -> str:
        return f"Perplexity: {self.perplexity}"


def measure_perplexity(
    model: PreTrainedModel, text: Text, sliding: Sliding, report: Report | None = None
) -> PerplexityResult:
    """Measure the perplexity of `model` on `text`; `report` is called with the progress.

    Its error is the error of the mean log-likelihood times the perplexity, as llama.cpp's
    perplexity tool prints it. Raises `QualityError`.
    """
    samples = [
        finite(scores.nll, done, "the negative log-likelihood")
        for _, done, scores in score_all(model, [text], sliding, report)
    ]
    return PerplexityResult(mean_of(torch.cat(samples)), text.scored)


def finite(values: Tensor, at: int, what: str) -> Tensor:
    """Return `values` [n], which follow `at` scored tokens. Raises `QualityError`, which names
    `what` and the position, if one is not finite."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise QualityError(
            f"{what} at scored token {at + index + 1} is {float(values[index])}: weights are "
            "damaged or overflow in this dtype; remake the pack"
        )
    return values
