"""A file of figures and tolerances that a later check is held against.

The file is JSON for people to read and edit: `figures` are what was measured, `tolerances` how much
worse each may become. A figure is too bad if it is worse than

    before + absolute + relative * before      (or before minus both, where more is better).
"""

import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from offload.errors import QualityError
from offload.files import BASELINE, asked_text, write_output
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
            before = max(before, 1.0)  # a model better than the reference is luck, not a standard
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


def _conditions(data: dict[str, Any]) -> dict[tuple[str, str], object]:
    """What two checks must share for their figures to be comparable, from their JSON objects.

    The keys are the words that a message uses.
    """
    found: dict[tuple[str, str], object] = {}
    for what in ("model", "reference"):
        identity = dict(data[what])
        del identity["settings"]  # the same model may be run with other settings
        found |= {(what, f"{name} "): repr(value) for name, value in identity.items()}
    found["set of prompts", ""] = str(data["prompts"]["sha256"])[:12]  # 48 bits tell sets apart
    found["window and stride", ""] = (int(data["window"]), int(data["stride"]))
    found["number of tokens", ""] = int(data["figures"]["tokens"])
    return found


@dataclass(frozen=True)
class Baseline:
    """Figures with their tolerances, and what they were measured on."""

    conditions: dict[tuple[str, str], object]
    reference_perplexity: float
    settings: dict[str, Any]  # the model's, for people
    figures: dict[str, float]
    tolerances: dict[str, Tolerance]

    def worse(self, result: CheckResult) -> tuple[Change, ...]:
        """Return the figures of `result` that are worse than allowed.

        Raises `QualityError` if `result` is of other models, prompts, windows or tokens.
        """
        conditions = _conditions(result.to_json())
        for what, name in self.conditions | conditions:
            before, now = (made.get((what, name)) for made in (self.conditions, conditions))
            if before != now:
                raise _differ(what, f"{name}{before}", now)
        figures = result.overall.figures()
        perplexity = figures["reference_perplexity"]
        if not math.isclose(self.reference_perplexity, perplexity, rel_tol=SAME_REFERENCE):
            before = f"perplexity {self.reference_perplexity:.3f}"
            raise _differ("reference", before, f"{perplexity:.3f}")
        changes = [
            Change(name, before, figures[name], self.tolerances[name].limit(name, before))
            for name, before in self.figures.items()
        ]
        return tuple(change for change in changes if change.is_worse)


def _differ(what: str, before: str, now: object) -> QualityError:
    return QualityError(
        f"the baseline is of another {what} ({before}, not {now}): compare like with like, or "
        f"{AGAIN}"
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

    Raises `OffloadError`.
    """
    text = json.dumps(baseline_of(result, tolerances), indent=2, ensure_ascii=False) + "\n"
    write_output(file, BASELINE, text.encode())


def read_baseline(file: Path) -> Baseline:
    """Read the baseline in `file`. Raises `OffloadError` if anything in it is missing or wrong."""
    try:
        data = json.loads(asked_text(file, "baseline"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it is not a {FORMAT}")
        if data.get("version") != VERSION:
            raise ValueError(f"its version is {data.get('version')}, not {VERSION}")
        return _parse(data)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
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
    return Baseline(
        _conditions(data),
        _number("reference_perplexity", data["figures"]["reference_perplexity"]),
        dict(data["model"]["settings"]),
        figures,
        tolerances,
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a finite number")
    return float(value)
