"""Comparing a model with a reference on the same tokens, one after the other.

Knows: that the two are never in memory together: the reference runs first, and its
log-probabilities wait in a temporary file that is read in the order it was written. Does not know:
the figures' formulas (`offload.comparison`), what they are held against (`offload.baseline`).

Letters: n tokens of a slice, V vocabulary.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.comparison import Comparison, Positions, kl_divergence
from offload.errors import QualityError
from offload.handle import Offload
from offload.perplexity import Report, finite
from offload.prompts import Prompts
from offload.scoring import Scores, Sliding, Text, encode_text, score
from offload.subject import Subject, subject_of
from quant.pack import is_pack

FLOAT_BYTES = 4
UNQUANTISED = "experts=16,dense=16"


@dataclass(frozen=True)
class Source:
    """A model that is loaded when its turn comes."""

    name: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]


@dataclass(frozen=True)
class CheckResult:
    """What was compared, and the figures: of all prompts together, and of each."""

    model: Subject
    reference: Subject
    prompts: Prompts
    sliding: Sliding
    overall: Comparison
    by_prompt: tuple[Comparison, ...]

    def named(self) -> list[tuple[str, Comparison]]:
        """The prompts' figures with their names."""
        return list(zip(self.prompts.names, self.by_prompt, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model.to_json(),
            "reference": self.reference.to_json(),
            "prompts": {"names": list(self.prompts.names), "sha256": self.prompts.sha256},
            "window": self.sliding.window,
            "stride": self.sliding.stride,
            "figures": self.overall.to_json(),
            "by_prompt": {name: comparison.to_json() for name, comparison in self.named()},
        }


def reference_bits(name: str) -> str | None:
    """The `bits` a reference called `name` is loaded with: a pack's own, else all there are."""
    return None if is_pack(Path(name).expanduser()) else UNQUANTISED


def check(
    model: Source,
    reference: Source,
    prompts: Prompts,
    sliding: Sliding,
    report: Report | None = None,
) -> CheckResult:
    """Run `reference` over the prompts, free it, run `model`, compare. `report` is told of each.

    Raises `QualityError` when the two have different vocabularies or give numbers that are none.
    """
    with record(reference, prompts, sliding, report) as recording:
        return compare(model, recording, report)


@dataclass(frozen=True)
class Recording:
    """A reference's log-probabilities [N, V] float32 for all prompts, one after the other."""

    file: IO[bytes]
    reference: Subject
    prompts: Prompts
    texts: tuple[Text, ...]
    sliding: Sliding

    @property
    def tokens(self) -> int:
        return sum(text.scored for text in self.texts)


@contextlib.contextmanager
def record(
    reference: Source, prompts: Prompts, sliding: Sliding, report: Report | None = None
) -> Iterator[Recording]:
    """Run `reference` once, for any number of models to be compared with it."""
    with tempfile.TemporaryFile(prefix="offload-check-") as file:
        yield _record(reference, prompts, sliding, file, report)


def compare(source: Source, recording: Recording, report: Report | None = None) -> CheckResult:
    """Run the model `source` and compare it with what was recorded. Raises as `check`."""
    _free()
    recording.file.seek(0)
    subject, by_prompt = _compare(source, recording, report)
    return CheckResult(
        subject,
        recording.reference,
        recording.prompts,
        recording.sliding,
        Comparison.of(Positions.joined(by_prompt)),
        tuple(Comparison.of(positions) for positions in by_prompt),
    )


def _free() -> None:
    gc.collect()  # transformers' models have cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the budget of the next model asks the driver what is free


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]:
    model, tokenizer = source.load()
    try:
        yield model, tokenizer
    finally:
        handle = getattr(model, "offload", None)
        if isinstance(handle, Offload):
            handle.close()


def _encode(tokenizer: PreTrainedTokenizerBase | None, prompts: Prompts) -> tuple[Text, ...]:
    pairs = zip(prompts.names, prompts.texts, strict=True)
    return tuple(encode_text(tokenizer, text, f"the prompt {name!r}") for name, text in pairs)


def _record(
    source: Source, prompts: Prompts, sliding: Sliding, file: IO[bytes], report: Report | None
) -> Recording:
    with _opened(source) as (model, tokenizer):
        subject, texts = subject_of(model, source.name), _encode(tokenizer, prompts)
        recording = Recording(file, subject, prompts, texts, sliding)
        done = 0
        for text in texts:
            for scores in score(model, text, sliding):
                finite(scores.nll, done, "the reference's negative log-likelihood")
                _write(file, scores.log_probs)
                done += len(scores.targets)
                if report is not None:
                    report(done, recording.tokens)
        return recording


def _compare(
    source: Source, recording: Recording, report: Report | None
) -> tuple[Subject, list[Positions]]:
    """What was run, and the positions of each prompt."""
    with _opened(source) as (model, tokenizer):
        subject, reference = subject_of(model, source.name), recording.reference
        if (
            subject.vocabulary != reference.vocabulary
            or _encode(tokenizer, recording.prompts) != recording.texts
        ):
            raise QualityError(
                f"{source.name} and {reference.name} have different vocabularies "
                f"({subject.vocabulary} and {reference.vocabulary} tokens): their next-token "
                "distributions cannot be compared"
            )
        done = 0
        by_prompt = []
        for text in recording.texts:
            parts = []
            for scores in score(model, text, recording.sliding):
                parts.append(_positions(scores, recording.file, done))
                done += len(scores.targets)
                if report is not None:
                    report(done, recording.tokens)
            by_prompt.append(Positions.joined(parts))
        return subject, by_prompt


def _positions(scores: Scores, file: IO[bytes], at: int) -> Positions:
    """`scores` beside what comes next in `file`; `at`: tokens scored before."""
    base = _read(file, *scores.log_probs.shape).to(scores.log_probs.device)
    nll = finite(scores.nll, at, "the model's negative log-likelihood")
    kl = finite(kl_divergence(base, scores.log_probs).cpu(), at, "the KL divergence")
    same_top = base.argmax(-1) == scores.log_probs.argmax(-1)
    return Positions(kl, same_top.cpu(), nll, Scores(scores.targets, base).nll)


def _write(file: IO[bytes], rows: Tensor) -> None:
    try:
        file.write(rows.cpu().contiguous().numpy().data)
    except OSError as error:
        raise QualityError(
            f"cannot keep the reference's log-probabilities in {tempfile.gettempdir()} ({error}): "
            "free some space there or name another folder with TMPDIR"
        ) from None


def _read(file: IO[bytes], count: int, vocabulary: int) -> Tensor:
    buffer = bytearray(file.read(count * vocabulary * FLOAT_BYTES))
    return torch.frombuffer(buffer, dtype=torch.float32).view(count, vocabulary)
