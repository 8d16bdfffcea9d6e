"""Moving records into slots: the protocol, and its implementation in host memory.

Knows: threads, copies, when one is complete. Does not know: which expert belongs where (`cache`),
nor what a record means (`quant`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from quant.pack import Pack


class Ticket(Protocol):
    """One copy under way."""

    @property
    def done(self) -> bool:
        """Whether the copy is complete (or failed: `Transfer.wait` says so)."""


class Transfer(Protocol):
    """Copies records into numbered slots. Not for use by several threads at once."""

    device: torch.device

    def slot(self, index: int) -> Tensor:
        """The bytes [slot_bytes] uint8 of a slot, on `device`."""

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> Ticket:
        """Begin to copy a record into `slot`.

        An urgent copy goes before those that are not and have not begun, where the link can do
        that.
        """

    def wait(self, ticket: Ticket) -> None:
        """Return when compute on `device` may use the slot. Raises what the copy raised."""

    def drain(self) -> None:
        """Drop the copies not yet begun and return when none is under way."""

    def release(self, slot: int) -> None:
        """What was computed from `slot` so far must finish before a later copy overwrites it."""

    @property
    def busy_seconds(self) -> float:
        """Time the link spent copying so far."""

    def close(self) -> None:
        """Finish what is under way, free the slots, end the threads."""


class HostTicket:
    """A copy from the mapped pack into host memory."""

    __slots__ = ("error", "expert", "finished", "layer", "slot", "urgent")

    def __init__(self, layer: int, expert: int, slot: int, urgent: bool) -> None:
        self.layer, self.expert, self.slot, self.urgent = layer, expert, slot, urgent
        self.finished = threading.Event()
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.finished.is_set()


class HostTransfer:
    """Slots in host memory, filled from the mapped pack by one thread.

    A record's checksum is compared the first time it is copied.
    """

    def __init__(self, pack: Pack, slots: int) -> None:
        self.device = torch.device("cpu")
        self._pack = pack
        self._slots = torch.empty(slots, pack.info.slot_bytes, dtype=torch.uint8)
        self._checked = [[False] * layer.num_experts for layer in pack.info.layers]
        self._queues: tuple[deque[HostTicket], deque[HostTicket]] = (
            deque(),
            deque(),
        )  # urgent, other
        self._wake = threading.Condition()
        self._copying = False
        self._closed = False
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="offload-copy", daemon=True)
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds

    def slot(self, index: int) -> Tensor:
        return self._slots[index]

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> HostTicket:
        ticket = HostTicket(layer, expert, slot, urgent)
        with self._wake:
            self._queues[0 if urgent else 1].append(ticket)
            self._wake.notify()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, HostTicket)
        if not ticket.done:
            self._hurry(ticket)
            while not ticket.finished.wait(1.0):
                if not self._thread.is_alive():
                    raise RuntimeError("the copy thread has ended")
        if ticket.error is not None:
            raise ticket.error

    def drain(self) -> None:
        with self._wake:
            for queue in self._queues:
                queue.clear()
            while self._copying:
                self._wake.wait(0.1)

    def release(self, slot: int) -> None:
        """Nothing to do: on a CPU what was called has finished."""

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._slots = torch.empty(0, 0, dtype=torch.uint8)

    def _hurry(self, ticket: HostTicket) -> None:
        with self._wake:
            urgent, other = self._queues
            if ticket in other:
                other.remove(ticket)
                urgent.append(ticket)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._queues[0] or self._queues[1] or self._closed):
                    self._wake.wait()
                if self._closed:
                    return
                ticket = (self._queues[0] or self._queues[1]).popleft()
                self._copying = True
            begin = time.perf_counter()
            try:
                self._copy(ticket)
            except Exception as error:  # handed to whoever waits for this copy
                ticket.error = error
            self._busy_seconds += time.perf_counter() - begin
            ticket.finished.set()
            with self._wake:
                self._copying = False
                self._wake.notify_all()

    def _copy(self, ticket: HostTicket) -> None:
        checked = self._checked[ticket.layer]
        if not checked[ticket.expert]:
            self._pack.check_record(ticket.layer, ticket.expert)
            checked[ticket.expert] = True
        record = self._pack.record(ticket.layer, ticket.expert)
        slot = self._slots[ticket.slot]
        # Not Tensor.copy_: it would take the compute's threads. memmove runs without the GIL.
        ctypes.memmove(slot.data_ptr(), record.data_ptr(), record.numel())
