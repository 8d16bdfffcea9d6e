"""Tokens drawn from logits, as sampling options ask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload.errors import GenerationError
from offload.sampling import COLDEST, HOTTEST, Sampling


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
