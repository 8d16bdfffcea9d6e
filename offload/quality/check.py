"""Comparing a model with a reference on the same tokens, one after the other.

Knows: that the reference runs first and is gone before the model is loaded; what must agree for
two models to be comparable. Does not know: the figures' formulas (`offload.quality.comparison`),
what they are held against (`offload.quality.baseline`).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.errors import QualityError
from offload.quality.comparison import Comparison, Positions, kl_divergence
from offload.quality.perplexity import Report, finite
from offload.quality.prompts import Prompts
from offload.quality.recording import Recording, Source, encode, opened, record
from offload.quality.scoring import Scores, Sliding, score
from offload.quality.subject import Subject, subject_of
from offload.quant.pack import is_pack

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
