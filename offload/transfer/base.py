"""What steps and copies tell whoever wants to know when they happen.

Knows: the words. Does not know: who listens (`offload.timeline`); as a rule nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


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


class Ticket(Protocol):
    """One copy under way."""

    @property
    def done(self) -> bool:
        """Whether the copy is complete (or failed: `Transfer.wait` says so)."""


class Transfer(Protocol):
    """Copies records into numbered slots. Not for use by several threads at once.

    Rows past the cache's slots are for experts that are streamed: used once, and not kept.
    """

    device: torch.device
    overtakes: bool  # an urgent copy goes before any other, even one that is under way
    streams_in_place: bool  # what goes into a row past the slots is not copied
    marks: Marks  # told of each copy that is over

    @property
    def slots(self) -> Tensor:
        """The bytes [slots, slot_bytes] uint8 of all slots, on `device`."""

    def slot(self, index: int) -> Tensor:
        """The bytes [slot_bytes] uint8 of a slot, on `device`."""

    def addresses(self) -> Tensor | None:
        """Where every record is, [layers, experts] int64, in memory that kernels on `device` can
        read; None where not all are."""

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> Ticket:
        """Begin to copy a record into `slot`.

        An urgent copy goes before those that are not and have not begun, where the link can do
        that.
        """

    def wait(self, ticket: Ticket) -> None:
        """Return when compute on `device` may use the slot. Raises what the copy raised."""

    def keep(self, layer: int, expert: int, row: int, slot: int) -> Ticket | None:
        """Copy a record that was waited for in `row`, past the slots, on into `slot`, inside
        the device. None: whatever is computed from now on may use it."""

    def drop(self, ticket: Ticket) -> bool:
        """Nobody wants this copy any more, its slot is used again; whether it never began."""

    def drain(self) -> None:
        """Drop the copies not yet begun and return when none is under way."""

    def release(self, slots: Sequence[int]) -> None:
        """What was computed from `slots` so far must finish before later copies overwrite them."""

    @property
    def busy_seconds(self) -> float:
        """Time the link spent copying so far."""

    def resize(self, slots: int, staging: int) -> None:
        """Give the slots' memory back and take `slots` instead, which hold nothing, and `staging`
        rows past them. Views of the old ones have to be gone."""

    def close(self) -> None:
        """Finish what is under way, free the slots, end the threads."""
