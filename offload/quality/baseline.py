"""A file of figures that a later check is held against.

Knows: the file's format, what makes two checks comparable, tolerances. Does not know: how figures
are measured (`offload.quality.check`), what is printed.

The file is JSON for people to read and edit: `figures` are what was measured, `tolerances` how much
worse each may become. A figure is too bad when it is worse than

    before + absolute + relative * before      (or before minus both, where more is better).
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from offload.errors import QualityError, SourceError
from offload.files import read_text, write_whole
from offload.quality.check import CheckResult
from offload.version import __version__

MORE_IS_BETTER = frozenset({"top1_agreement"})


@dataclass(frozen=True)
class Tolerance:
    """How much worse a figure may become."""

    relative: float = 0.0
    absolute: float = 0.0

    def limit(self, figure: str, before: float) -> float:
        """The worst that `figure` may be when it was `before`."""
        if figure == "perplexity_ratio":
            before = max(before, 1.0)  # below the reference's is luck, not something to keep
        allowed = self.absolute + self.relative * abs(before)
        return before - allowed if figure in MORE_IS_BETTER else before + allowed


# On one machine a check repeats to the last bit, so tolerances are for other processors and
# versions. What rounding alone does is bounded by the demo in bfloat16 against itself in float32:
# KL mean 0.0010, median 0.0007, 99% 0.006, max 0.02, 2.5% other top tokens, perplexity 0.04%
# (docs/log.md). The absolute parts are above that, and matter where a figure is near 0 as at 8
# and 16 bits; the relative parts are well below what a bit less costs.
TOLERANCES = {
    "kl_mean": Tolerance(relative=0.10, absolute=0.002),
    "kl_median": Tolerance(relative=0.15, absolute=0.002),
    # Set by a few positions: steadier than the maximum, less than the mean.
    "kl_p99": Tolerance(relative=0.30, absolute=0.02),
    # Set by one position; twice as far is a new kind of mistake.
    "kl_max": Tolerance(relative=1.00, absolute=0.05),
    "top1_agreement": Tolerance(absolute=0.03),
    # The perplexity itself is this times the reference's, which has to be the same.
    # llama.cpp's q4_K_M costs 2.8% on Llama 3 8B, its q8_0 0.04% (its perplexity README).
    "perplexity_ratio": Tolerance(relative=0.01),
}


@dataclass(frozen=True)
class Change:
    """A figure that may not be as it is: `now` is beyond `limit`, `before` is the baseline's."""

    figure: str
    before: float
    now: float
    limit: float

    @property
    def is_worse(self) -> bool:
        within = self.now >= self.limit if self.figure in MORE_IS_BETTER else self.now <= self.limit
        return not within  # so written, a NaN is worse

    def __str__(self) -> str:
        bound = "at least" if self.figure in MORE_IS_BETTER else "at most"
        now, limit, before = (f"{value:.4g}" for value in (self.now, self.limit, self.before))
        return f"{self.figure} {now} ({bound} {limit} allowed, was {before})"


FORMAT = "moe-offload quality baseline"
VERSION = 1
AGAIN = "make it again with --save-baseline"
SAME_REFERENCE = 0.01  # relative: other processors round a perplexity differently, by far less


@dataclass(frozen=True)
class Baseline:
    """Figures with their tolerances, and what they were measured on."""

    model: dict[str, Any]  # what `Subject.identity` says
    reference: dict[str, Any]
    prompts_sha256: str
    window: int
    stride: int
    tokens: int
    reference_perplexity: float
    settings: dict[str, Any]  # the model's, for people: they may differ from one run to the next
    figures: dict[str, float]
    tolerances: dict[str, Tolerance]

    def worse(self, result: CheckResult) -> tuple[Change, ...]:
        """Which figures of `result` are worse than they may be.

        Raises `QualityError` when the two are not about the same.
        """
        self._check_comparable(result)
        now = result.overall.figures()
        changes = [
            Change(name, self.figures[name], now[name], tolerance.limit(name, self.figures[name]))
            for name, tolerance in self.tolerances.items()
        ]
        return tuple(change for change in changes if change.is_worse)

    def _check_comparable(self, result: CheckResult) -> None:
        def differ(what: str, before: object, now: object) -> QualityError:
            return QualityError(
                f"the baseline is of another {what} ({before}, not {now}): compare like with like, "
                f"or {AGAIN}"
            )

        pairs = (
            ("model", self.model, result.model.identity),
            ("reference", self.reference, result.reference.identity),
        )
        for what, before, now in pairs:
            for key in sorted({*before, *now}):
                if before.get(key) != now.get(key):
                    raise differ(what, f"{key} {before.get(key)!r}", f"{now.get(key)!r}")
        if self.prompts_sha256 != result.prompts.sha256:
            raise differ("set of prompts", self.prompts_sha256[:12], result.prompts.sha256[:12])
        sliding = (result.sliding.window, result.sliding.stride)
        if (self.window, self.stride) != sliding:
            raise differ("window and stride", (self.window, self.stride), sliding)
        if self.tokens != result.overall.tokens:
            raise differ("number of tokens", self.tokens, result.overall.tokens)
        perplexity = result.overall.reference_perplexity.value
        if not math.isclose(self.reference_perplexity, perplexity, rel_tol=SAME_REFERENCE):
            raise differ(
                "reference", f"perplexity {self.reference_perplexity:.3f}", f"{perplexity:.3f}"
            )


def baseline_of(
    result: CheckResult, tolerances: dict[str, Tolerance] = TOLERANCES
) -> dict[str, Any]:
    """What is written to the file."""
    figures = result.overall.to_json()
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {
            "moe-offload": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "model": result.model.to_json(),
        "reference": result.reference.to_json(),
        "prompts": {"names": list(result.prompts.names), "sha256": result.prompts.sha256},
        "window": result.sliding.window,
        "stride": result.sliding.stride,
        "figures": figures,
        "tolerances": {name: asdict(tolerance) for name, tolerance in tolerances.items()},
    }


def save_baseline(
    file: Path, result: CheckResult, tolerances: dict[str, Tolerance] = TOLERANCES
) -> None:
    """Write `result` as a baseline; the file that was there stays until the new one is whole."""
    text = json.dumps(baseline_of(result, tolerances), indent=2, ensure_ascii=False) + "\n"
    try:
        write_whole(file, text.encode())
    except OSError as error:
        raise QualityError(f"cannot write the baseline to {file}: {error}") from None


def read_baseline(file: Path) -> Baseline:
    """The baseline in `file`; nothing that it must hold is guessed. Raises `QualityError`."""
    try:
        with file.open(encoding="utf-8") as handle:
            data = json.loads(read_text(handle, "it"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it is not a {FORMAT}")
        if data.get("version") != VERSION:
            raise ValueError(f"its version is {data.get('version')}, not {VERSION}")
        return _parse(data)
    except OSError as error:
        raise QualityError(f"cannot read the baseline: {error}") from None
    except (SourceError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise QualityError(f"{file} is not a usable baseline ({what}): {AGAIN}") from None


def _parse(data: dict[str, Any]) -> Baseline:
    figures = {name: _number(name, data["figures"][name]) for name in TOLERANCES}
    tolerances = {}
    for name in TOLERANCES:
        given = data["tolerances"][name]
        parts = {
            part: _number(f"{name}'s {part}", given[part]) for part in ("relative", "absolute")
        }
        if min(parts.values()) < 0:
            raise ValueError(f"the tolerance of {name} is negative")
        tolerances[name] = Tolerance(**parts)
    model, reference = dict(data["model"]), dict(data["reference"])
    settings = dict(model.pop("settings"))
    reference.pop("settings")
    return Baseline(
        model=model,
        reference=reference,
        prompts_sha256=str(data["prompts"]["sha256"]),
        window=int(data["window"]),
        stride=int(data["stride"]),
        tokens=int(data["figures"]["tokens"]),
        reference_perplexity=_number(
            "reference_perplexity", data["figures"]["reference_perplexity"]
        ),
        settings=settings,
        figures=figures,
        tolerances=tolerances,
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a finite number")
    return float(value)
