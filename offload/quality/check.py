"""Comparing a model with a reference on the same tokens, one after the other.

Knows: that the reference runs first and is gone before the model is loaded; what must agree for
two models to be comparable. Does not know: the figures' formulas (`offload.quality.comparison`),
what they are held against (`offload.quality.baseline`).
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import Offload
from offload.errors import QualityError
from offload.quality.prompts import Prompts
from offload.quality.scoring import (
    Estimate,
    Report,
    Scores,
    Sliding,
    Text,
    encode_text,
    exp_of,
    finite,
    mean_of,
    score,
    share_of,
)
from offload.quant.pack import is_pack


@dataclass(frozen=True)
class Positions:
    """What is known of each scored position: all [n], on the CPU."""

    kl: Tensor  # KL(P || Q) in nats
    same_top: Tensor  # bool: P and Q have their maximum at the same token
    nll: Tensor  # of the text's token under Q
    reference_nll: Tensor  # under P

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """One after the other."""
        return cls(
            torch.cat([part.kl for part in parts]),
            torch.cat([part.same_top for part in parts]),
            torch.cat([part.nll for part in parts]),
            torch.cat([part.reference_nll for part in parts]),
        )


@dataclass(frozen=True)
class Comparison:
    """The figures of llama.cpp's `--kl-divergence`, by the same formulas."""

    tokens: int
    kl_mean: Estimate
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: Estimate  # share of positions with the same most probable token
    perplexity: Estimate
    reference_perplexity: Estimate
    ratio: Estimate  # the model's perplexity over the reference's

    @classmethod
    def of(cls, positions: Positions) -> Comparison:
        """The ratio's error is that of the mean difference of both log-likelihoods: as they are of
        the same tokens, most of what they vary is common and cancels."""
        kl = positions.kl.double()
        return cls(
            tokens=len(kl),
            kl_mean=mean_of(kl),
            kl_median=float(kl.quantile(0.5)),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            agreement=share_of(positions.same_top),
            perplexity=exp_of(mean_of(positions.nll)),
            reference_perplexity=exp_of(mean_of(positions.reference_nll)),
            ratio=exp_of(mean_of(positions.nll - positions.reference_nll)),
        )

    def figures(self) -> dict[str, float]:
        """The figures by name, errors left out."""
        return {
            "kl_mean": self.kl_mean.value,
            "kl_median": self.kl_median,
            "kl_p99": self.kl_p99,
            "kl_max": self.kl_max,
            "top1_agreement": self.agreement.value,
            "perplexity": self.perplexity.value,
            "perplexity_ratio": self.ratio.value,
            "reference_perplexity": self.reference_perplexity.value,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            **self.figures(),
            "kl_mean_error": self.kl_mean.error,
            "top1_agreement_error": self.agreement.error,
            "perplexity_error": self.perplexity.error,
            "perplexity_ratio_error": self.ratio.error,
            "reference_perplexity_error": self.reference_perplexity.error,
        }


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(P || Q) [n] in nats of log-probabilities `reference` and `model` [n, V].

    Never below 0: what rounding leaves there is not a distance.
    """
    terms = reference.exp() * (reference - model)
    terms = terms.where(reference.isfinite(), 0)  # p log p is 0 where p is
    return terms.sum(-1, dtype=torch.float64).clamp_min(0)


HEADINGS = ("prompt", "tokens", "KL mean", "median", "99%", "max", "same top", "ppl", "ratio")


def table(rows: Sequence[tuple[str, Comparison]]) -> str:
    """The figures as aligned lines; the last row, of all prompts, then with its errors."""
    cells = [HEADINGS, *(_cells(name, comparison) for name, comparison in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in pairs)
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in cells)
    ]
    total = rows[-1][1]
    return "\n".join(
        [
            *lines,
            "",
            f"KL(reference || model): {total.kl_mean.value:.6f} ± {total.kl_mean.error:.6f} nats",
            f"Same top token: {total.agreement.value:.2%} ± {total.agreement.error:.2%}",
            f"Perplexity: {total.perplexity}, of the reference {total.reference_perplexity}, "
            f"ratio {total.ratio.value:.4f} ± {total.ratio.error:.4f}",
        ]
    )


def _cells(name: str, comparison: Comparison) -> tuple[str, ...]:
    kl = (
        comparison.kl_mean.value,
        comparison.kl_median,
        comparison.kl_p99,
        comparison.kl_max,
    )
    return (
        name,
        str(comparison.tokens),
        *(f"{value:.4f}" for value in kl),
        f"{comparison.agreement.value:.1%}",
        f"{comparison.perplexity.value:.3f}",
        f"{comparison.ratio.value:.4f}",
    )


@dataclass(frozen=True)
class Subject:
    """A model by its name and shape, and the settings it was run with."""

    name: str
    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    settings: dict[str, Any]  # bits, dtype, device: these may change

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for figures to be comparable."""
        return {name: value for name, value in self.to_json().items() if name != "settings"}


def subject_of(model: PreTrainedModel, source: str) -> Subject:
    """`model`, loaded from `source`. Of a pack, the name is that of what it was made from."""
    text = model.config.get_text_config()
    handle = getattr(model, "offload", None)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "runner": "transformers",
    }
    if isinstance(handle, Offload):
        info = handle.pack.info
        source = info.source
        settings["runner"] = "offload"
        settings["bits"] = info.bits
    return Subject(
        name=source,
        model_type=model.config.model_type,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocabulary=text.vocab_size,
        settings=settings,
    )


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Source:
    """A model that is loaded when its turn comes."""

    name: str
    load: Callable[[], Loaded]


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Loaded]:
    """The model `source`, closed afterwards."""
    model, tokenizer = source.load()
    try:
        yield model, tokenizer
    finally:
        handle = getattr(model, "offload", None)
        if isinstance(handle, Offload):
            handle.close()


def encode(tokenizer: PreTrainedTokenizerBase | None, prompts: Prompts) -> tuple[Text, ...]:
    """The prompts as tokens. Raises `QualityError` where there are too few."""
    pairs = zip(prompts.names, prompts.texts, strict=True)
    return tuple(encode_text(tokenizer, text, f"the prompt {name!r}") for name, text in pairs)


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

    def read(self, count: int) -> Tensor:
        """The next `count` rows [count, V]."""
        vocabulary = self.reference.vocabulary
        buffer = bytearray(self.file.read(count * vocabulary * FLOAT_BYTES))
        return torch.frombuffer(buffer, dtype=torch.float32).view(count, vocabulary)


@contextlib.contextmanager
def record(
    reference: Source, prompts: Prompts, sliding: Sliding, report: Report | None = None
) -> Iterator[Recording]:
    """Run `reference` once, for any number of models to be compared with it."""
    with tempfile.TemporaryFile(prefix="offload-check-") as file:
        yield _record(reference, prompts, sliding, file, report)


def _record(
    source: Source, prompts: Prompts, sliding: Sliding, file: IO[bytes], report: Report | None
) -> Recording:
    with opened(source) as (model, tokenizer):
        subject, texts = subject_of(model, source.name), encode(tokenizer, prompts)
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


def _write(file: IO[bytes], rows: Tensor) -> None:
    try:
        file.write(rows.cpu().contiguous().numpy().data)
    except OSError as error:
        raise QualityError(
            f"cannot keep the reference's log-probabilities in {tempfile.gettempdir()} ({error}): "
            "free some space there or name another folder with TMPDIR"
        ) from None


UNQUANTISED = "experts=16,dense=16"


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


def _compare(
    source: Source, recording: Recording, report: Report | None
) -> tuple[Subject, list[Positions]]:
    """What was run, and the positions of each prompt."""
    with opened(source) as (model, tokenizer):
        subject, reference = subject_of(model, source.name), recording.reference
        if (
            subject.vocabulary != reference.vocabulary
            or encode(tokenizer, recording.prompts) != recording.texts
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
                parts.append(_positions(scores, recording, done))
                done += len(scores.targets)
                if report is not None:
                    report(done, recording.tokens)
            by_prompt.append(Positions.joined(parts))
        return subject, by_prompt


def _positions(scores: Scores, recording: Recording, at: int) -> Positions:
    """`scores` beside what comes next in `recording`; `at`: tokens scored before."""
    base = recording.read(len(scores.targets)).to(scores.log_probs.device)
    nll = finite(scores.nll, at, "the model's negative log-likelihood")
    kl = finite(kl_divergence(base, scores.log_probs).cpu(), at, "the KL divergence")
    same_top = base.argmax(-1) == scores.log_probs.argmax(-1)
    return Positions(kl, same_top.cpu(), nll, Scores(scores.targets, base).nll)
