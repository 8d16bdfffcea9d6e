"""Who will be asked for next, guessed from who was asked for.

Knows: choices of past steps of generated tokens. Does not know: hidden states (the predictor
"router" is `offload`'s), nor what a guess leads to (`cache.cache`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

MOST_AHEAD = 3  # layers


class Lookahead(NamedTuple):
    """Who guesses, and for how many layers ahead; 0: nobody."""

    predictor: str
    layers: int


class Predictor(Protocol):
    """Guesses a layer's experts from what it observed."""

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """The step of `layer` for one generated token asked for `experts`."""

    def guess(self, layer: int, ahead: int) -> list[int]:
        """Experts of layer `layer + ahead`, likeliest first; `layer` was observed just now."""


class Previous:
    """What the layer was asked for at the token before."""

    def __init__(self, layers: int) -> None:
        self._last: list[list[int]] = [[] for _ in range(layers)]

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._last[layer] = list(experts)

    def guess(self, layer: int, ahead: int) -> list[int]:
        return list(self._last[layer + ahead])


class Transitions:
    """What was asked for most often when the present layer was asked for what it is now."""

    def __init__(self, layers: int) -> None:
        self._last: list[list[int]] = [[] for _ in range(layers)]
        # (layer, layers ahead, expert) -> how often each expert there followed it
        self._followed: dict[tuple[int, int, int], Counter[int]] = {}

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        for ahead in range(1, min(MOST_AHEAD, layer) + 1):
            for expert in self._last[layer - ahead]:
                key = (layer - ahead, ahead, expert)
                self._followed.setdefault(key, Counter()).update(experts)
        self._last[layer] = list(experts)

    def guess(self, layer: int, ahead: int) -> list[int]:
        votes: Counter[int] = Counter()
        for expert in self._last[layer]:
            votes.update(self._followed.get((layer, ahead, expert), ()))
        return [expert for expert, _ in votes.most_common(len(self._last[layer]))]


class Union:
    """What either of two predictors says, in turns."""

    def __init__(self, one: Predictor, other: Predictor) -> None:
        self._both = (one, other)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        for predictor in self._both:
            predictor.observe(layer, experts)

    def guess(self, layer: int, ahead: int) -> list[int]:
        one, other = (predictor.guess(layer, ahead) for predictor in self._both)
        return merged(one, other)


def merged(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Both lists, likeliest first, each expert once."""
    longest = max(len(one), len(other))
    turns = (place[at] for at in range(longest) for place in (one, other) if at < len(place))
    return list(dict.fromkeys(turns))


def make_predictor(name: str, layers: int) -> Predictor | None:
    """The predictor called `name`, as far as it is known here: None for the router's alone."""
    match name:
        case "previous":
            return Previous(layers)
        case "transitions":
            return Transitions(layers)
        case "union":
            return Union(Previous(layers), Transitions(layers))
        case _:
            return None


PREDICTORS = ("router", "previous", "transitions", "union")
WITH_ROUTER = ("router", "union")  # those that ask a later layer's router, too
NO_LOOKAHEAD = Lookahead("router", 0)

WINDOW = 256  # steps of one MoE layer


class LookaheadBalance:
    """Weighs guessing against waiting; `worthwhile` may change at the end of each window."""

    def __init__(self) -> None:
        self.worthwhile = True  # until measured
        self._steps = 0
        self._guesses = 0
        self._guess_seconds = 0.0
        self._cost = 0.0  # seconds a guess took, in the last window that had any
        self._needed = 0
        self._copies_before = 0
        self._copy_seconds_before = 0.0

    def guessed(self, seconds: float) -> None:
        """One guess was made in `seconds`."""
        self._guesses += 1
        self._guess_seconds += seconds

    def step(self, needed: int, copies: int, copy_seconds: float) -> None:
        """One step is over, for which `needed` experts were loaded: on demand, or by a right guess.

        `copies` and `copy_seconds` are totals since the beginning.
        """
        self._steps += 1
        self._needed += needed
        if self._steps < WINDOW:
            return
        if self._guesses:
            self._cost = self._guess_seconds / self._guesses
        if copies > self._copies_before:
            seconds = copy_seconds - self._copy_seconds_before
            a_copy = seconds / (copies - self._copies_before)
            self.worthwhile = self._needed / self._steps * a_copy > self._cost
        elif not self._needed:  # a guess cannot spare what nobody waits for
            self.worthwhile = False
        self._copies_before, self._copy_seconds_before = copies, copy_seconds
        self._steps = self._guesses = self._needed = 0
        self._guess_seconds = 0.0


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
