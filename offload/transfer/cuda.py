"""Records into slots in GPU memory; every call gives the link the copies that became ready."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.errors import TransferError
from offload.quant.pack import Pack
from offload.ranges import work
from offload.transfer.base import addresses_of
from offload.transfer.disk_tier import Read
from offload.transfer.host_tier import HostTier
from offload.transfer.memory import CudaPinner
from offload.transfer.order import CopyOrder


class CudaLink:
    """Copies into the memory of one GPU, in two queues."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._urgent = torch.cuda.Stream(device)
        self._guesses = torch.cuda.Stream(device)

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        """Memory [slots, slot_bytes] uint8 of the GPU. Raises `torch.OutOfMemoryError`."""
        return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.device)

    def copy(
        self, target: Tensor, source: Tensor, *, urgent: bool, after: Sequence[torch.cuda.Event]
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queue a copy that waits for `after`; return the events of its begin and its end."""
        stream = self._urgent if urgent else self._guesses
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        return begin, end

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy inside the GPU's memory, in order with the compute queued before and after."""
        target.copy_(source, non_blocking=True)

    def computed(self) -> torch.cuda.Event:
        """The event that occurs when the compute queued so far is done."""
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def compute_waits(self, event: torch.cuda.Event) -> None:
        """Make compute queued from now on wait for `event`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Return when the GPU has done everything."""
        torch.cuda.synchronize(self.device)

    def free_cached(self) -> None:
        """Give unused memory back to the driver, so that a large piece can be allocated."""
        torch.cuda.empty_cache()

    def rate(self, sample: Tensor, repeats: int = 3) -> float:
        """Bytes/s of copying pinned host memory to the device."""
        target = torch.empty_like(sample, device=self.device)
        self.copy(target, sample, urgent=True, after=())[1].synchronize()
        spans = [self.copy(target, sample, urgent=True, after=()) for _ in range(repeats)]
        spans[-1][1].synchronize()
        seconds: float = spans[0][0].elapsed_time(spans[-1][1]) / 1e3
        return sample.nbytes * repeats / seconds


# Bytes of guesses under way at a time, or one record if that is larger. 16 MiB take 0.6 ms.
GUESSED_BYTES = 16 << 20


@dataclass(eq=False, slots=True)
class CudaTicket:
    """A copy into a slot: not begun, under way, or complete."""

    layer: int
    expert: int
    slot: int
    read: Read | None  # of a record that may have to come from the disk first
    begin: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None
    over: bool = False  # complete or dropped, and known to be

    @property
    def done(self) -> bool:
        return self.over or (self.end is not None and self.end.query())


class CudaTransfer:
    """Slots in GPU memory, filled from pinned host memory.

    Urgent copies and guesses have a stream each, so that an urgent copy does not wait for guesses
    that were begun before it: it shares the link with at most `GUESSED_BYTES` of them.
    """

    overtakes = False  # an urgent copy only goes before the guesses not yet given to the link
    streams_in_place = in_place = False

    def __init__(
        self,
        pack: Pack,
        slots: int,
        device: torch.device,
        ram: int,
        *,
        tier: HostTier | None = None,
        link: CudaLink | None = None,
    ) -> None:
        """`tier` is shared with other transfers; None: one of `ram` bytes is made. Where this
        raises, nothing stays allocated or pinned."""
        self.device = device
        self._link = link = link or CudaLink(device)
        self._info = pack.info
        self.slots = link.allocate(slots, pack.info.slot_bytes)
        link.synchronize()  # compute may still use the tensors that had this memory before
        if tier is None:
            tier = HostTier(pack, ram, CudaPinner(device), link.rate)
        self.tier = tier
        self._busy_seconds = 0.0
        self._last_end: torch.cuda.Event | None = None  # of the copy counted last
        self._clear()
        tier.join(self._go_on)

    def _clear(self) -> None:
        """Nothing is under way."""
        self._order: CopyOrder[CudaTicket] = CopyOrder(max(GUESSED_BYTES, self._info.slot_bytes))
        self._under_way: tuple[deque[CudaTicket], deque[CudaTicket]] = (deque(), deque())
        self._released: dict[int, torch.cuda.Event] = {}  # slot -> when compute was done with it
        self._written: dict[int, CudaTicket] = {}  # slot -> the copy into it given last

    @property
    def busy_seconds(self) -> float:
        self._collect()
        return self._busy_seconds

    def slot(self, index: int) -> Tensor:
        return self.slots[index]

    def addresses(self) -> Tensor | None:
        if self.tier.disk is not None or not self.tier.pinned:
            return None
        # `record` compares checksums, which kernels do not.
        return addresses_of(self._info.layers, self.tier.record)

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> CudaTicket:
        disk = self.tier.disk
        read = None if disk is None else disk.want(layer, expert, urgent=urgent)
        ticket = CudaTicket(layer, expert, slot, read)
        ready = read is None or read.ready
        size = self._info.layout_of(layer).record_bytes
        self._order.add(ticket, size, urgent=urgent, ready=ready)
        self._go_on()
        return ticket

    def wait(self, ticket: CudaTicket) -> None:
        if ticket in self._order:
            self._order.urge(ticket)
            if ticket.read is not None and self.tier.disk is not None:
                self.tier.disk.urge(ticket.read)
            self._go_on()
        while ticket in self._order:
            self._wait_for_bytes(ticket)
            self.tier.go_on()  # others' copies may hold every buffer until they are counted
        if ticket.read is not None and ticket.read.error is not None:
            raise ticket.read.error
        if not ticket.over:
            if ticket.end is None:  # `_give` failed, for this copy or for one before it
                raise TransferError("a copy to the GPU could not begin: ask again")
            self._link.compute_waits(ticket.end)

    def _wait_for_bytes(self, ticket: CudaTicket) -> None:
        """Return when the disk may have brought the record.

        A copy that ends meanwhile may free the buffer that the record needs.
        """
        assert ticket.read is not None, "it can begin"
        assert self.tier.disk is not None
        under_way = next((queue[0] for queue in self._under_way if queue), None)
        if ticket.read.buffer is None and under_way is not None:
            assert under_way.end is not None
            under_way.end.synchronize()  # sync: every buffer may be held by copies
        else:
            self.tier.disk.wait(ticket.read, 0.01)

    def keep(self, layer: int, expert: int, row: int, slot: int) -> None:
        size = self._info.layout_of(layer).record_bytes
        under_way = self._written.get(slot)
        if under_way is not None and not under_way.over and under_way.end is not None:
            self._link.compute_waits(under_way.end)
        self._link.move(self.slots[slot, :size], self.slots[row, :size])
        self.release([row, slot])

    def drop(self, ticket: CudaTicket) -> bool:
        if not self._order.drop(ticket):
            return False  # the link has the copy, and does it before the one that follows
        self._let_go(ticket)
        return True

    def drain(self) -> None:
        self._link.synchronize()
        if self.tier.disk is not None:
            self.tier.disk.start_over()
        self._clear()

    def release(self, slots: Sequence[int]) -> None:
        self._released |= dict.fromkeys(slots, self._link.computed())
        if self._order.waiting:
            self._go_on()

    def resize(self, slots: int, staging: int) -> None:
        self.drain()
        self.slots = self.slots[:0].clone()  # free the memory before taking other
        self._link.free_cached()
        self.slots = self._link.allocate(slots + staging, self._info.slot_bytes)

    def close(self) -> None:
        self._link.synchronize()
        self._clear()
        self.tier.leave(self._go_on)
        self.slots = self.slots[:0].clone()

    def _go_on(self) -> None:
        """Give the link the copies that may begin by now."""
        self._collect()
        if self.tier.disk is not None:
            for ticket in self._order.waiting:
                assert ticket.read is not None
                if ticket.read.error is not None:
                    self.drop(ticket)
                elif ticket.read.ready:
                    self._order.ready(ticket)
        for begin in self._order.begin():
            self._give(begin.job, begin.urgent, begin.after)

    def _give(self, ticket: CudaTicket, urgent: bool, after: CudaTicket | None) -> None:
        record = self.tier.record(ticket.layer, ticket.expert, ticket.read)
        before = [event] if (event := self._released.pop(ticket.slot, None)) is not None else []
        for earlier in (self._written.get(ticket.slot), after):
            if earlier is not None and not earlier.over and earlier.end is not None:
                before.append(earlier.end)
        target = self.slots[ticket.slot, : record.numel()]
        with work("copy" if urgent else "guess", ticket.layer, ticket.expert):
            ticket.begin, ticket.end = self._link.copy(target, record, urgent=urgent, after=before)
        self._written[ticket.slot] = ticket
        self._under_way[0 if urgent else 1].append(ticket)

    def _collect(self) -> None:
        """Count the copies that are complete, the first to begin first, and release buffers."""
        while over := [queue for queue in self._under_way if queue and queue[0].done]:
            ticket = min(over, key=lambda at: _seconds(over[0][0].begin, at[0].begin)).popleft()
            self._order.finished(ticket)
            self._count(ticket)
            self._let_go(ticket)

    def _count(self, ticket: CudaTicket) -> None:
        begin = self._last_end or ticket.begin  # the copy counted last may be on the other stream
        seconds = min(_seconds(ticket.begin, ticket.end), _seconds(begin, ticket.end))
        if seconds > 0:
            self._busy_seconds += seconds
            self._last_end = ticket.end

    def _let_go(self, ticket: CudaTicket) -> None:
        ticket.over = True
        if self._written.get(ticket.slot) is ticket:
            del self._written[ticket.slot]
        if ticket.read is not None and self.tier.disk is not None:
            self.tier.disk.release(ticket.read)


def _seconds(begin: torch.cuda.Event | None, end: torch.cuda.Event | None) -> float:
    assert begin is not None
    assert end is not None
    return float(begin.elapsed_time(end)) / 1e3
