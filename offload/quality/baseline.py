"""A file of figures and tolerances that a later check is held against.

The file is JSON for people to read and edit: `figures` are what was measured, `tolerances` how much
worse each may become. A figure is too bad if it is worse than

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
        """The worst value that `figure` may have if it was `before`."""
        if figure == "perplexity_ratio":
            before = max(before, 1.0)  # to be better than the reference is luck, not a standard
        allowed = self.absolute + self.relative * abs(before)
        return before - allowed if figure in MORE_IS_BETTER else before + allowed


# On one machine a check repeats to the last bit, so tolerances are for other processors and
# versions. The demo in bfloat16 against itself in float32 shows how far rounding alone can go:
# KL mean 0.0010, median 0.0007, 99% 0.006, max 0.02, 2.5% other top tokens, perplexity 0.04%
# (docs/log/quality.md). The absolute parts are above that; they matter for figures near 0, as at 8
# and 16 bits. The relative parts are well below the cost of one bit less.
TOLERANCES = {
    "kl_mean": Tolerance(relative=0.10, absolute=0.002),
    "kl_median": Tolerance(relative=0.15, absolute=0.002),
    # A few positions decide this figure: it is steadier than the maximum, but less than the mean.
    "kl_p99": Tolerance(relative=0.30, absolute=0.02),
    # One position decides this figure; only more than twice the distance is a new kind of error.
    "kl_max": Tolerance(relative=1.00, absolute=0.05),
    "top1_agreement": Tolerance(absolute=0.03),
    # The model's perplexity is this ratio times the reference's, which must be the same.
    # llama.cpp's q4_K_M costs 2.8% on Llama 3 8B, and its q8_0 0.04% (its perplexity README).
    "perplexity_ratio": Tolerance(relative=0.01),
}


@dataclass(frozen=True)
class Change:
    """A figure beside the baseline's: it was `before`, is `now`, and may be `limit` at worst."""

    figure: str
    before: float
    now: float
    limit: float

    @property
    def is_worse(self) -> bool:
        within = self.now >= self.limit if self.figure in MORE_IS_BETTER else self.now <= self.limit
        return not within  # a NaN is worse too, because no comparison with it holds

    def __str__(self) -> str:
        bound = "at least" if self.figure in MORE_IS_BETTER else "at most"
        now, limit, before = (f"{value:.4g}" for value in (self.now, self.limit, self.before))
        return f"{self.figure} {now} ({bound} {limit} allowed, was {before})"


FORMAT = "moe-offload quality baseline"
VERSION = 1
AGAIN = "make it again with --save-baseline"
SAME_REFERENCE = 0.01  # relative difference; rounding on other processors makes far less


@dataclass(frozen=True)
class Baseline:
    """Figures with their tolerances, and the models and prompts they were measured on."""

    model: dict[str, Any]  # `MeasuredModel.identity`
    reference: dict[str, Any]
    prompts_sha256: str
    window: int
    stride: int
    tokens: int
    reference_perplexity: float
    settings: dict[str, Any]  # the model's, for people; a check may be run with other settings
    figures: dict[str, float]
    tolerances: dict[str, Tolerance]

    def worse(self, result: CheckResult) -> tuple[Change, ...]:
        """Return the figures of `result` that are worse than allowed.

        Raises `QualityError` if `result` is of other models, prompts, windows or tokens.
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
    """The object that is written to the file."""
    made_from = result.to_json()
    del made_from["by_prompt"]
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
        **made_from,
        "tolerances": {name: asdict(tolerance) for name, tolerance in tolerances.items()},
    }


def save_baseline(
    file: Path, result: CheckResult, tolerances: dict[str, Tolerance] = TOLERANCES
) -> None:
    """Write `result` as a baseline. A file that already exists stays until the new one is whole.

    Raises `QualityError`.
    """
    text = json.dumps(baseline_of(result, tolerances), indent=2, ensure_ascii=False) + "\n"
    try:
        write_whole(file, text.encode())
    except OSError as error:
        raise QualityError(f"cannot write the baseline to {file}: {error}") from None


def read_baseline(file: Path) -> Baseline:
    """Read the baseline in `file`. Raises `QualityError` if anything in it is missing or wrong."""
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
