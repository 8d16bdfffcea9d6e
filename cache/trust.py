"""Whether a layer's guesses have earned the right to evict.

Knows: which guesses came true. Does not know: who guesses, slots, clocks.

Guesses of resident experts cost nothing and prove nothing, so only the others count. A predictor
that is wrong loses the right to load within a few guesses of a layer, goes on guessing without
consequences, and has it back when it was right often enough.
"""

from __future__ import annotations

RATE = 1 / 16  # of a guessed expert in the running mean
ENOUGH = 0.5  # a load that is not asked for costs about what one that is asked for spares


class Trust:
    """A running mean, for each layer, of how often guesses of absent experts came true."""

    def __init__(self, layers: int) -> None:
        self.mean = [ENOUGH] * layers

    def may_load(self, layer: int) -> bool:
        """Whether guesses for `layer` may fill free slots."""
        return self.mean[layer] >= ENOUGH

    def may_evict(self, layer: int) -> bool:
        """Whether they may push out what is resident: only once they proved right."""
        return self.mean[layer] > ENOUGH

    def learn(self, layer: int, right: int, wrong: int) -> None:
        """Of the absent experts guessed for a step, `right` were asked for and `wrong` were not."""
        mean = self.mean[layer]
        for came_true, times in ((1.0, right), (0.0, wrong)):
            for _ in range(times):
                mean += RATE * (came_true - mean)
        self.mean[layer] = mean
