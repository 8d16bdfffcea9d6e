"""Guessing goes on while the waiting it spares costs more than it does."""

from __future__ import annotations

from offload.cache.guesses import WINDOW, LookaheadBalance


class Steps:
    """A balance and the totals it is told."""

    def __init__(self) -> None:
        self.balance = LookaheadBalance()
        self.copies = 0
        self.copy_seconds = 0.0

    def window(
        self, *, needed: int, copy_seconds: float, guess_seconds: float | None = None
    ) -> None:
        """A window of steps that each copy and need `needed` experts."""
        for _ in range(WINDOW):
            if guess_seconds is not None:
                self.balance.guessed(guess_seconds)
            self.copies += needed
            self.copy_seconds += needed * copy_seconds
            self.balance.step(needed, self.copies, self.copy_seconds)


def test_looks_ahead_until_it_is_measured() -> None:
    balance = LookaheadBalance()
    assert balance.worthwhile
    for _ in range(WINDOW - 1):
        balance.guessed(10.0)
        balance.step(1, 1, 1e-6)
    assert balance.worthwhile
    balance.guessed(10.0)
    balance.step(1, 2, 2e-6)
    assert not balance.worthwhile


def test_slow_copies_are_worth_a_guess_and_quick_ones_are_not() -> None:
    slow, quick = Steps(), Steps()
    slow.window(needed=2, copy_seconds=1e-2, guess_seconds=1e-3)
    quick.window(needed=2, copy_seconds=1e-4, guess_seconds=1e-3)
    assert slow.balance.worthwhile
    assert not quick.balance.worthwhile


def test_many_quick_copies_are_worth_what_one_slow_copy_is() -> None:
    steps = Steps()
    steps.window(needed=20, copy_seconds=1e-4, guess_seconds=1e-3)
    assert steps.balance.worthwhile


def test_cost_of_a_guess_is_remembered_while_there_are_none() -> None:
    steps = Steps()
    steps.window(needed=1, copy_seconds=1e-4, guess_seconds=1e-3)
    steps.window(needed=1, copy_seconds=1e-4)
    assert not steps.balance.worthwhile
    steps.window(needed=1, copy_seconds=1e-2)  # say, the records fell out of the page cache
    assert steps.balance.worthwhile


def test_each_window_is_weighed_alone() -> None:
    steps = Steps()
    for _ in range(5):
        steps.window(needed=1, copy_seconds=1.0, guess_seconds=1e-3)
    steps.window(needed=1, copy_seconds=1e-4, guess_seconds=1e-3)
    assert not steps.balance.worthwhile


def test_where_nothing_is_ever_needed_no_guess_is_worth_its_time() -> None:
    steps = Steps()
    steps.window(needed=0, copy_seconds=0.0, guess_seconds=1e-5)
    assert not steps.balance.worthwhile
    steps.window(needed=1, copy_seconds=1e-2)  # another text
    assert steps.balance.worthwhile
