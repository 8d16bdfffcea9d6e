"""The sampling parameters of a user: defaults, ranges, and where each value comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypedDict, Unpack

from offload.errors import GenerationError

if TYPE_CHECKING:
    from transformers import GenerationConfig

PARAMETERS: dict[str, type[int] | type[float]] = {  # the names that users know them by
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}


class SamplingKeywords(TypedDict, total=False):
    """Parameters that a caller may give; None is the same as not given."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """Complete sampling parameters.

    `temperature` 0 is greedy, and 0 switches top_k and min_p off. Raises `GenerationError` for a
    value that is out of range or not a number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not is_number(getattr(self, name), Real):
                raise GenerationError(f"{name} is {getattr(self, name)!r}: it must be a number")
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None and not is_number(getattr(self, name), Integral):
                raise GenerationError(
                    f"{name} is {getattr(self, name)!r}: it must be a whole number"
                )
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
        }
        for name, (holds, allowed) in ranges.items():
            if not holds:
                raise GenerationError(f"{name} is {getattr(self, name)}: it must be {allowed}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed is {self.seed}: it must be from 0 to 2**63 - 1")


def is_number(value: object, kind: type[Real] | type[Integral]) -> bool:
    """Whether `value` is of `kind` and not a bool, which Python counts as a whole number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def resolve_sampling(
    config: GenerationConfig | None,
    *,
    fallback: Sampling | None = None,
    **given: Unpack[SamplingKeywords],
) -> Sampling:
    """Take what is not `given` from the checkpoint's `config`, otherwise from `fallback`.

    Without a `fallback` and without a given temperature, a checkpoint that does not ask for
    sampling decodes greedily. Raises `GenerationError` for a value out of range.
    """
    base = fallback or Sampling()
    if config is not None and config.do_sample:
        # transformers' own defaults stand in for what the file does not mention
        base = Sampling(
            1.0 if config.temperature is None else config.temperature,
            50 if config.top_k is None else config.top_k,
            1.0 if config.top_p is None else config.top_p,
            config.min_p or 0.0,
            config.repetition_penalty or 1.0,
        )
    elif config is not None and config.repetition_penalty:
        base = replace(base, repetition_penalty=config.repetition_penalty)
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(base, **changes)  # type: ignore[arg-type]
