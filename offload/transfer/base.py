"""The protocol of moving expert records into slots."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.quant.pack import PackLayer


class Ticket(Protocol):
    """One copy under way."""

    @property
    def done(self) -> bool:
        """Whether the copy is complete (or failed: `Transfer.wait` says so)."""


class Transfer(Protocol):
    """Copies records into numbered slots. Not for use by several threads at once.

    A transfer is given only tickets of its own, which `start` or `keep` returned.

    Rows past the cache's slots are for experts that are streamed, which are used once and not kept.
    """

    device: torch.device
    overtakes: bool  # an urgent copy goes before any other, even one that is under way
    streams_in_place: bool  # a record that goes into a row past the slots is not copied
    in_place: bool  # no record is copied: a slot is where its record is mapped

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

        An urgent copy goes before the guesses that have not begun, where the link can do that.
        """

    def wait(self, ticket: Any) -> None:
        """Return when compute on `device` may use the slot. Raises what the copy raised."""

    def keep(self, layer: int, expert: int, row: int, slot: int) -> Ticket | None:
        """Copy a record inside the device, from `row`, which is past the slots, into `slot`.

        Wait for the record in `row` first. None: compute may use the slot from now on.
        """

    def drop(self, ticket: Any) -> bool:
        """Give up a copy whose slot another record needs; return whether the copy never began."""

    def drain(self) -> None:
        """Drop the copies not yet begun and return when none is under way."""

    def release(self, slots: Sequence[int]) -> None:
        """Let later copies overwrite `slots` once the compute queued so far is done with them."""

    @property
    def busy_seconds(self) -> float:
        """Time the link spent copying so far."""

    def resize(self, slots: int, staging: int) -> None:
        """Free the memory of the slots and take that of `slots` empty ones and `staging` rows.

        Views of the old slots have to be gone. Raises `torch.OutOfMemoryError`.
        """

    def close(self) -> None:
        """Finish the copies under way, free the slots and end the threads."""


def addresses_of(layers: Sequence[PackLayer], record: Callable[[int, int], Tensor]) -> Tensor:
    """Where each `record(layer, expert)` begins, [layers, most experts of a layer] int64."""
    table = torch.zeros(len(layers), max(n.num_experts for n in layers), dtype=torch.int64)
    for index, layer in enumerate(layers):
        for expert in range(layer.num_experts):
            table[index, expert] = record(index, expert).data_ptr()
    return table
