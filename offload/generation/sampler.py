"""Draws tokens from logits according to the sampling parameters, with transformers' processors."""

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
from offload.sampling import Sampling

COLDEST = 1e-5  # choices at a lower temperature are greedy: logits divided by it would overflow
HOTTEST = torch.finfo(torch.float32).max  # a higher temperature would be infinite in float32


class Sampler:
    """Chooses tokens, and holds the random state that the choices depend on."""

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

    def go_back(self, state: Tensor) -> None:
        """Return to `state`, with a new generator: a graph capture that failed leaves the old
        generator unusable."""
        self.generator = torch.Generator(self.generator.device)
        self.generator.set_state(state)

    def reseed(self, seed: int | None) -> None:
        """Begin a sequence with `seed`. None means a random seed."""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Choose the next token [1, 1] after `ids` [1, T] from the last token's `logits` [1, V].

        A logit may be -inf, which means that its token is never chosen. Raises `GenerationError`
        if all are -inf, or if any logit is NaN or +inf.
        """
        token, trouble = self.draw(ids, logits)
        check_trouble(int(trouble))  # sync: a token drawn from damaged logits must not be used
        return token

    def draw(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a token like `__call__`, without waiting for the device.

        Also returns a number that must pass `check_trouble` before the token is used.
        """
        scores: Tensor = self._processors(ids, logits.float())
        # If any element is NaN, then so is the maximum.
        trouble = (~scores.max().isfinite()).long() + (~logits.max().isfinite()).long()
        if self._greedy:
            return scores.argmax(dim=-1, keepdim=True), trouble
        probabilities = torch.softmax(scores, dim=-1)
        # The argmax of p / Exp(1) is distributed as p (exponential race, the Gumbel-max trick).
        # torch.multinomial draws one sample in the same way, but its assertion ends the process
        # on a GPU.
        race = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / race).argmax(dim=-1, keepdim=True), trouble


def check_trouble(trouble: int) -> None:
    """Raise `GenerationError` if `trouble`, which `Sampler.draw` returned, is not 0.

    It is 1 if only the processed scores lack a finite maximum, and 2 if the logits lack it too.
    """
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
