"""Whether looking ahead pays.

Knows: the seconds guessing cost and the seconds copies took, as told. Does not know: clocks,
routers, slots; what a guess loads is decided by `cache.cache`.

A right guess spares at most the wait for one copy. Where copies are quicker than guesses (RAM to
RAM on a CPU) it cannot pay, where they are slow (a bus, a disk) it does: so it is measured, over
windows of steps.
"""

from __future__ import annotations

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
