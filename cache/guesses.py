"""When guessing the next layer's experts pays, and which guesses may load or evict."""

WINDOW = 256  # steps, each of one MoE layer


class LookaheadBalance:
    """Weighs the seconds that guesses cost against the waiting that they spare.

    `worthwhile` says whether to guess; it may change at the end of each window of steps.
    """

    def __init__(self) -> None:
        self.worthwhile = True  # until the first window is measured
        self._steps = 0
        self._guesses = 0
        self._guess_seconds = 0.0
        self._cost = 0.0  # seconds a guess took in the last window that had guesses
        self._needed = 0
        self._copies_before = 0
        self._copy_seconds_before = 0.0

    def guessed(self, seconds: float) -> None:
        """One guess was made in `seconds`."""
        self._guesses += 1
        self._guess_seconds += seconds

    def step(self, needed: int, copies: int, copy_seconds: float) -> None:
        """One step is over; `needed` experts were loaded for it, urgently or by a right guess.

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
        elif not self._needed:  # no step waited, so a guess can save nothing
            self.worthwhile = False
        self._copies_before, self._copy_seconds_before = copies, copy_seconds
        self._steps = self._guesses = self._needed = 0
        self._guess_seconds = 0.0


RATE = 1 / 16  # weight of one guessed expert in the running mean
ENOUGH = 0.5  # a wrong load costs about as much as a right one spares


class Trust:
    """A running mean, for each layer, of how often guesses of absent experts came true."""

    def __init__(self, layers: int) -> None:
        self.mean = [ENOUGH] * layers

    def may_load(self, layer: int) -> bool:
        """Whether guesses for `layer` may fill free slots."""
        return self.mean[layer] >= ENOUGH

    def may_evict(self, layer: int) -> bool:
        """Whether guesses for `layer` may evict residents: only once they came true often."""
        return self.mean[layer] > ENOUGH

    def learn(self, layer: int, right: int, wrong: int) -> None:
        """Note how many absent guessed experts a step asked for (`right`) and did not (`wrong`)."""
        mean = self.mean[layer]
        for came_true in [1.0] * right + [0.0] * wrong:
            mean += RATE * (came_true - mean)
        self.mean[layer] = mean
