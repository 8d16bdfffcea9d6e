"""What steps and copies tell whoever wants to know when they happen.

Knows: the words. Does not know: who listens (`offload.timeline`); as a rule nobody.
"""

from __future__ import annotations

from typing import Protocol


class Marks(Protocol):
    """Told by the engine and its transfer, from their threads."""

    def mark(self, name: str, layer: int, expert: int | None = None) -> None:
        """What the step did since the last mark was `name`."""

    def copied(self, layer: int, expert: int, urgent: bool, begin: float, seconds: float) -> None:
        """A copy ran for `seconds` from `begin` on, a moment of `time.perf_counter`."""


class NoMarks:
    """Nobody listens."""

    def mark(self, name: str, layer: int, expert: int | None = None) -> None:
        pass

    def copied(self, layer: int, expert: int, urgent: bool, begin: float, seconds: float) -> None:
        pass


NO_MARKS = NoMarks()
