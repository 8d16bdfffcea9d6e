"""Records into slots in host memory, copied from the mapped pack by one thread."""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from offload.errors import TransferError
from offload.quant.pack import Pack
from offload.ranges import work
from offload.transfer.base import addresses_of
from offload.transfer.disk_tier import RecordFiles
from offload.transfer.memory import PAGE, pages_of
from offload.transfer.order import UrgentFirst

READERS = 8
PIECE = 256 << 10  # bytes of a read
AT_ONCE = 32  # reads between two looks for urgent copies
IN_MEMORY = bytes(answer & 1 for answer in range(256))  # the bit of mincore's answer for a page


class PageIn:
    """Reads the missing parts of records with several threads, into the system's page cache.

    Where the system cannot say what it has in memory, or lacks `preadv`, nothing is done: the
    mapping works all the same, slower.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._mincore = _mincore() if hasattr(os, "preadv") else None
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="offload-page-in")
        self._local = threading.local()

    def bring_in(self, layer: int, expert: int, between: Callable[[], None] | None = None) -> None:
        """Return when the record's pages are in memory. Raises `PackError`.

        `between` is called now and then, and may bring in another record.
        """
        missing = self._missing(layer, expert)
        while missing:
            some, missing = missing[:AT_ONCE], missing[AT_ONCE:]
            for _ in self._threads.map(lambda at: self._read(layer, at), some):
                pass
            if between is not None and missing:
                between()

    def _missing(self, layer: int, expert: int) -> list[int]:
        """Where in its file each piece of a record begins that is not in memory as a whole."""
        if self._mincore is None:
            return []
        record = self._pack.record(layer, expert)
        first, size = pages_of(record)
        pages = ctypes.create_string_buffer(size // PAGE)
        if self._mincore(ctypes.c_void_p(first), ctypes.c_size_t(size), pages):
            return []
        here = pages.raw.translate(IN_MEMORY)
        begin = self._pack.place(layer, expert)[1] - (record.data_ptr() - first)
        step = PIECE // PAGE
        return [begin + at * PAGE for at in range(0, len(here), step) if 0 in here[at : at + step]]

    def _read(self, layer: int, begin: int) -> None:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = memoryview(bytearray(PIECE))
        self._pack.read_at(layer, begin, self._local.scratch)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _mincore() -> Any:
    """The system's answer to which pages are in memory, or None where it has none."""
    return getattr(ctypes.CDLL(None), "mincore", None)


CHUNK = 1 << 18  # bytes of a guess that are copied between two looks for urgent copies
NOWHERE = -1  # the slot of a ticket that only marks its place in the queue


class HostTicket:
    """A copy from the mapped pack into host memory.

    `under_way` is a bell: a lock that the copy thread releases once, after it has set `done`. A
    waiter may leave it taken, since nobody waits for a copy that is done.
    """

    __slots__ = ("done", "dropped", "error", "expert", "layer", "slot", "under_way", "urgent")

    def __init__(self, layer: int, expert: int, slot: int, urgent: bool) -> None:
        self.layer, self.expert, self.slot, self.urgent = layer, expert, slot, urgent
        self.done = False
        self.under_way = threading.Lock()
        self.under_way.acquire()
        self.error: Exception | None = None
        self.dropped = False


class HostTransfer:
    """Slots in host memory, filled from the mapped pack by one thread.

    A record for a row past the slots is not copied: it is read into memory, should it not be there,
    and computed from where it is mapped. With `in_place` this holds for every slot.
    A record that has left memory is read as a whole before it is copied, and its checksum is
    compared the first time.

    The two threads share nothing but deques, a `SimpleQueue` and each ticket's bell, whose
    operations Ctrl-C cannot cut in two; the lock inside a `Condition` or `Event` could stay taken.
    Call `drain` after an interrupted `wait`.
    """

    overtakes = True
    streams_in_place = True

    def __init__(self, pack: Pack, slots: int, *, in_place: bool = False) -> None:
        self.device, self.in_place = torch.device("cpu"), in_place
        self._pack = pack
        self._page_in = PageIn(pack)
        self.slots = self._new_slots(slots)
        self._mapped: dict[int, Tensor] = {}  # slot in place, or row past the slots -> record
        self._files = RecordFiles(pack)
        self.waiting: UrgentFirst[HostTicket] = UrgentFirst()
        self._wake: SimpleQueue[bool] = SimpleQueue()  # True: look at the queues, False: end
        self.busy_seconds = 0.0
        self._closed = False
        self._thread = self._new_thread()

    def _new_slots(self, slots: int) -> Tensor:
        count = 0 if self.in_place else slots
        return torch.empty(count, self._pack.info.slot_bytes, dtype=torch.uint8)

    def _new_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="offload-copy", daemon=True)
        thread.start()
        return thread

    def slot(self, index: int) -> Tensor:
        return self.slots[index] if index < len(self.slots) else self._mapped[index]

    def addresses(self) -> Tensor:
        return addresses_of(self._pack.info.layers, self._pack.record)

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> HostTicket:
        if slot >= len(self.slots):
            self._mapped[slot] = self._pack.record(layer, expert)
        ticket = HostTicket(layer, expert, slot, urgent)
        self.waiting.add(ticket, urgent=urgent)
        self._wake.put(True)
        return ticket

    def wait(self, ticket: HostTicket) -> None:
        if not ticket.done:
            if self.waiting.urge(ticket):
                self._wake.put(True)  # the thread may have looked while the ticket was in neither
            while not ticket.done:
                rang = ticket.under_way.acquire(timeout=1.0)
                if not rang and not ticket.done and not self._thread.is_alive():
                    raise TransferError("the thread that copies experts has ended: ask again")
        if ticket.error is not None:
            raise ticket.error

    def keep(self, layer: int, expert: int, row: int, slot: int) -> HostTicket:
        return self.start(layer, expert, slot, urgent=True)  # the row is the mapped record

    def drop(self, ticket: HostTicket) -> bool:
        ticket.dropped = True  # a copy under way stops, and the one that follows begins
        return self.waiting.remove(ticket)

    def drain(self) -> None:
        self.waiting.clear()
        if not self._closed and not self._thread.is_alive():  # an exception ended it
            self._thread = self._new_thread()
        self.wait(self.start(0, 0, NOWHERE, urgent=True))  # the copy under way comes before it

    def release(self, slots: Sequence[int]) -> None:
        """Nothing to do: on a CPU a call returns when its work is done."""

    def resize(self, slots: int, staging: int) -> None:
        self.drain()
        self._mapped.clear()
        self.slots = self._new_slots(0)  # free the memory before taking more
        self.slots = self._new_slots(slots)

    def close(self) -> None:
        self.waiting.clear()
        self._closed = True
        self._wake.put(False)
        self._thread.join()
        self._page_in.close()
        self.slots = torch.empty(0, 0, dtype=torch.uint8)
        self._mapped.clear()

    def _run(self) -> None:
        while self._wake.get():
            ticket = self.waiting.pop()
            if ticket is not None:  # else it was dropped
                self._serve(ticket)

    def _serve(self, ticket: HostTicket) -> None:
        begin = time.perf_counter()
        try:
            if ticket.slot != NOWHERE:
                with work("copy" if ticket.urgent else "guess", ticket.layer, ticket.expert):
                    self._copy(ticket)
        except Exception as error:  # handed to whoever waits for this copy
            ticket.error = error
        self.busy_seconds += time.perf_counter() - begin
        ticket.done = True
        ticket.under_way.release()

    def _give_way(self) -> None:
        """Do urgent copies in the middle of a guess."""
        with contextlib.suppress(IndexError):  # there is none (any more)
            while (ticket := self.waiting.urgent.popleft()).slot != NOWHERE:
                begin = time.perf_counter()
                self._serve(ticket)
                self.busy_seconds -= time.perf_counter() - begin  # counted by the guess around it
            self.waiting.urgent.appendleft(ticket)  # a drain waits for this copy, too

    def _copy(self, ticket: HostTicket) -> None:
        between = None if ticket.urgent else self._give_way
        self._page_in.bring_in(ticket.layer, ticket.expert, between)
        record = self._pack.record(ticket.layer, ticket.expert)
        self._files.check(ticket.layer, ticket.expert, record)
        if ticket.slot >= len(self.slots):
            record[::PAGE].sum()  # reads the pages that have left memory from disk
            return
        slot = self.slots[ticket.slot]
        # Not Tensor.copy_: it would take the compute's threads. memmove runs without the GIL.
        if ticket.urgent:
            ctypes.memmove(slot.data_ptr(), record.data_ptr(), record.numel())
            return
        for at in range(0, record.numel(), CHUNK):
            self._give_way()
            if ticket.dropped:
                return
            size = min(CHUNK, record.numel() - at)
            ctypes.memmove(slot.data_ptr() + at, record.data_ptr() + at, size)
