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
from offload.quality.tolerance import TOLERANCES, Change, Tolerance
from offload.version import __version__

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
