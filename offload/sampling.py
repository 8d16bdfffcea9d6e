"""How the next token is chosen: parameters, and transformers' logits processors for them.

Knows: names, ranges and defaults. Does not know: models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from transformers import (
    GenerationConfig,
)

from offload.errors import GenerationError

COLDEST = 1e-5  # the temperature below which choices are greedy: logits divided by it overflow
PARAMETERS: dict[str, type[int] | type[float]] = {  # by which users know them
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
HOTTEST = torch.finfo(torch.float32).max  # above it a float32 temperature is infinite


@dataclass(frozen=True)
class Sampling:
    """Complete sampling parameters. `temperature` 0 is greedy; 0 switches top_k and min_p off."""

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
    """Whether `value` is of `kind`, and no truth value (which Python counts as a whole number)."""
    return isinstance(value, kind) and not isinstance(value, bool)


def resolve_sampling(
    config: GenerationConfig | None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    fallback: Sampling | None = None,
) -> Sampling:
    """Fill what was not given from the checkpoint's `generation_config`, else from `fallback`.

    A checkpoint that does not ask for sampling decodes greedily, unless a temperature is given or
    there is a `fallback`. Raises `GenerationError` for a value out of range.
    """
    base = fallback or Sampling()
    if config is not None and config.do_sample:
        # transformers' own defaults where the file is silent
        base = Sampling(
            1.0 if config.temperature is None else config.temperature,
            50 if config.top_k is None else config.top_k,
            1.0 if config.top_p is None else config.top_p,
            config.min_p or 0.0,
            config.repetition_penalty or 1.0,
        )
    elif config is not None and config.repetition_penalty:
        base = Sampling(
            base.temperature, base.top_k, base.top_p, base.min_p, config.repetition_penalty
        )
    return Sampling(
        base.temperature if temperature is None else temperature,
        base.top_k if top_k is None else top_k,
        base.top_p if top_p is None else top_p,
        base.min_p if min_p is None else min_p,
        base.repetition_penalty if repetition_penalty is None else repetition_penalty,
        seed,
    )
