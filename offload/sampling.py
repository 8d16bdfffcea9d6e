"""How the next token is chosen: parameters, and transformers' logits processors for them.

Knows: names, ranges and defaults. Does not know: models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
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


class Sampler:
    """Chooses tokens; holds the random state."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        self._greedy = sampling.temperature < COLDEST
        if not self._greedy:
            processors.append(TemperatureLogitsWarper(float(min(sampling.temperature, HOTTEST))))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p:
                processors.append(MinPLogitsWarper(float(sampling.min_p)))
        self._processors = processors
        self.generator = torch.Generator(device)
        self.reseed(sampling.seed)

    def state(self) -> Tensor:
        """What later draws depend on."""
        return self.generator.get_state()

    def go_back(self, state: Tensor) -> None:
        """Draw as when `state` was asked for, with another generator: a capture that broke off does
        not give the old one back."""
        self.generator = torch.Generator(self.generator.device)
        self.generator.set_state(state)

    def reseed(self, seed: int | None) -> None:
        """Begin a sequence with `seed`; None: with any."""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The next token [1, 1] after `ids` [1, T], from the last token's `logits` [1, V].

        A logit may be -inf (a token that never comes). Raises `GenerationError` where all are, or
        one is NaN or +inf: what is chosen from such is garbage.
        """
        token, trouble = self.draw(ids, logits)
        check_trouble(int(trouble))  # sync: garbage is told, not said
        return token

    def draw(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As calling it, without asking the device: the token, and what `check_trouble` is to be
        told of it before it is believed."""
        scores: Tensor = self._processors(ids, logits.float())
        # NaN anywhere is the largest.
        trouble = (~scores.max().isfinite()).long() + (~logits.max().isfinite()).long()
        if self._greedy:
            return scores.argmax(dim=-1, keepdim=True), trouble
        probabilities = torch.softmax(scores, dim=-1)
        # What torch.multinomial does for one sample, without its assertion, which on a GPU ends the
        # process: the largest of p / Exp(1) is p's (Gumbel's trick).
        race = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / race).argmax(dim=-1, keepdim=True), trouble


def check_trouble(trouble: int) -> None:
    """Raise `GenerationError` when a token was drawn from what is not finite."""
    if trouble == 1:
        raise GenerationError(
            "the sampling parameters leave no finite logits: choose a higher temperature, "
            "or a repetition_penalty nearer to 1"
        )
    if trouble:
        raise GenerationError(
            "the model's logits are not finite, so no token can be chosen: its weights are "
            "damaged, or too large for the dtype it is computed in"
        )
