"""Records into slots in GPU memory; every call gives the link the copies that became ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, Self

import psutil
import torch
from torch import Tensor

from offload.quant.pack import Pack
from offload.ranges import work
from offload.transfer.base import Ticket
from offload.transfer.disk_tier import Read
from offload.transfer.host_tier import HostTier
from offload.transfer.order import CopyOrder
from offload.transfer.pinning import CudaPinner
from offload.units import SHARE


class DeviceEvent(Protocol):
    """A moment in the order of what the device does."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Return when it has passed."""

    def elapsed_time(self, end_event: Self, /) -> float:
        """Milliseconds from this event to a later one, both passed."""


class Link(Protocol):
    """Copies into a device's memory, in two queues."""

    device: torch.device

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        """Memory [slots, slot_bytes] uint8 of the device. Raises `torch.OutOfMemoryError`."""

    def copy(
        self, target: Tensor, source: Tensor, *, urgent: bool, after: Sequence[DeviceEvent]
    ) -> tuple[DeviceEvent, DeviceEvent]:
        """Give a copy to one of the queues, where it waits for `after`; when it begins and ends."""

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy inside the device's memory, in order with the compute queued before and after."""

    def computed(self) -> DeviceEvent:
        """When the compute queued so far is done."""

    def compute_waits(self, event: DeviceEvent) -> None:
        """Compute queued from now on comes after `event`."""

    def synchronize(self) -> None:
        """Return when the device has done everything."""

    def free_cached(self) -> None:
        """Give unused memory back to the driver, so that a large piece can be allocated."""


class CudaLink:
    """One GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._urgent = torch.cuda.Stream(device)
        self._guesses = torch.cuda.Stream(device)

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.device)

    def copy(
        self, target: Tensor, source: Tensor, *, urgent: bool, after: Sequence[DeviceEvent]
    ) -> tuple[DeviceEvent, DeviceEvent]:
        stream = self._urgent if urgent else self._guesses
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for event in after:
                assert isinstance(event, torch.cuda.Event)
                stream.wait_event(event)
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        return begin, end

    def move(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def computed(self) -> DeviceEvent:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def compute_waits(self, event: DeviceEvent) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_cached(self) -> None:
        torch.cuda.empty_cache()

    def rate(self, sample: Tensor, repeats: int = 3) -> float:
        """Bytes/s of copying pinned host memory to the device."""
        target = torch.empty_like(sample, device=self.device)
        self.copy(target, sample, urgent=True, after=())[1].synchronize()
        spans = [self.copy(target, sample, urgent=True, after=()) for _ in range(repeats)]
        spans[-1][1].synchronize()
        return sample.nbytes * repeats / (spans[0][0].elapsed_time(spans[-1][1]) / 1e3)


# Bytes of guesses under way at a time, or one record if that is larger. 16 MiB take 0.6 ms.
GUESSED_BYTES = 16 << 20


class CudaTicket:
    """A copy into a slot: not begun, under way, or complete."""

    __slots__ = ("begin", "end", "expert", "job", "layer", "over", "read", "slot", "urgent")

    def __init__(
        self, job: int, layer: int, expert: int, slot: int, urgent: bool, read: Read | None
    ) -> None:
        self.job, self.layer, self.expert, self.slot, self.urgent = job, layer, expert, slot, urgent
        self.read = read  # of a record that may have to come from the disk first
        self.begin: DeviceEvent | None = None
        self.end: DeviceEvent | None = None
        self.over = False  # complete or dropped, and known to be

    @property
    def done(self) -> bool:
        return self.over or (self.end is not None and self.end.query())


class CudaTransfer:
    """Slots in GPU memory, filled from pinned host memory.

    Urgent copies and guesses have a stream each, so that an urgent copy does not wait for guesses
    that were begun before it: it shares the link with at most `GUESSED_BYTES` of them.
    """

    overtakes = False  # an urgent copy only goes before the guesses not yet given to the link
    streams_in_place = False

    def __init__(
        self,
        pack: Pack,
        slots: int,
        device: torch.device,
        ram: int | None,
        *,
        tier: HostTier | None = None,
        link: Link | None = None,
    ) -> None:
        """`tier` is shared with other transfers; None: one of `ram` bytes (None: a share of the
        free RAM). Where this raises, nothing stays allocated or pinned."""
        if link is None:
            link = cuda = CudaLink(device)
        self.device = device
        self._link = link
        self._slot_bytes = pack.info.slot_bytes
        self._layers = pack.info.layers
        self._slots = link.allocate(slots, self._slot_bytes)
        link.synchronize()  # compute may still use the tensors that had this memory before
        if tier is None:
            budget = int(psutil.virtual_memory().available * SHARE) if ram is None else ram
            tier = HostTier(pack, budget, CudaPinner(device), cuda.rate)
        self.tier = tier
        self._record_bytes = [
            pack.info.layout_of(i).record_bytes for i in range(len(pack.info.layers))
        ]
        self._busy_seconds = 0.0
        self._last_end: DeviceEvent | None = None  # of the copy counted last
        self._jobs = 0
        self._clear()
        tier.join(self._go_on)

    def _clear(self) -> None:
        """Nothing is under way."""
        self._order = CopyOrder(max(GUESSED_BYTES, self._slot_bytes))
        self._waiting: dict[int, CudaTicket] = {}  # by job
        self._under_way: tuple[deque[CudaTicket], deque[CudaTicket]] = (deque(), deque())
        self._released: dict[int, DeviceEvent] = {}  # slot -> when compute was done with it
        self._written: dict[int, CudaTicket] = {}  # slot -> the copy into it given last

    @property
    def busy_seconds(self) -> float:
        self._collect()
        return self._busy_seconds

    @property
    def slots(self) -> Tensor:
        return self._slots

    def slot(self, index: int) -> Tensor:
        return self._slots[index]

    def addresses(self) -> Tensor | None:
        if self.tier.disk is not None or not self.tier.pinned:
            return None
        for layer, info in enumerate(self._layers):  # kernels compare no checksums: once, here
            for expert in range(info.num_experts):
                self.tier.record(layer, expert)
        return self.tier.addresses()

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> CudaTicket:
        self._jobs += 1
        read = self.tier.want(layer, expert, urgent=urgent)
        ticket = CudaTicket(self._jobs, layer, expert, slot, urgent, read)
        self._waiting[ticket.job] = ticket
        ready = read is None or read.ready
        self._order.add(ticket.job, self._record_bytes[layer], urgent=urgent, ready=ready)
        self._go_on()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, CudaTicket)
        if ticket.job in self._waiting:
            self._order.urge(ticket.job)
            ticket.urgent = True
            if ticket.read is not None and self.tier.disk is not None:
                self.tier.disk.urge(ticket.read)
            self._go_on()
        while ticket.job in self._waiting:
            self._wait_for_bytes(ticket)
            self.tier.go_on()  # others' copies may hold every buffer until they are counted
        if ticket.read is not None and ticket.read.error is not None:
            raise ticket.read.error
        if not ticket.over and ticket.end is not None:
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
        size = self._record_bytes[layer]
        under_way = self._written.get(slot)
        if under_way is not None and not under_way.over and under_way.end is not None:
            self._link.compute_waits(under_way.end)
        self._link.move(self._slots[slot, :size], self._slots[row, :size])
        self.release([row, slot])

    def drop(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, CudaTicket)
        if not self._order.drop(ticket.job):
            return False  # the link has the copy, and does it before the one that follows
        del self._waiting[ticket.job]
        self._let_go(ticket)
        return True

    def drain(self) -> None:
        self._link.synchronize()
        if self.tier.disk is not None:
            self.tier.disk.start_over()
        self._clear()

    def release(self, slots: Sequence[int]) -> None:
        self._released |= dict.fromkeys(slots, self._link.computed())
        if self._waiting:
            self._go_on()

    def resize(self, slots: int, staging: int) -> None:
        self.drain()
        self._slots = self._slots[:0].clone()  # free the memory before taking other
        self._link.free_cached()
        self._slots = self._link.allocate(slots + staging, self._slot_bytes)

    def close(self) -> None:
        self._link.synchronize()
        self._clear()
        self.tier.leave(self._go_on)
        self._slots = self._slots[:0].clone()

    def _go_on(self) -> None:
        """Give the link the copies that may begin by now."""
        self._collect()
        if self.tier.disk is not None:
            for ticket in list(self._waiting.values()):
                assert ticket.read is not None
                if ticket.read.error is not None:
                    self.drop(ticket)
                elif ticket.read.ready:
                    self._order.ready(ticket.job)
        for begin in self._order.begin():
            self._give(self._waiting.pop(begin.job), begin.urgent, begin.after)

    def _give(self, ticket: CudaTicket, urgent: bool, after: int | None) -> None:
        record = self.tier.record(ticket.layer, ticket.expert, ticket.read)
        before = [event] if (event := self._released.pop(ticket.slot, None)) is not None else []
        for earlier in (self._written.get(ticket.slot), self._urgent_copy(after)):
            if earlier is not None and not earlier.over and earlier.end is not None:
                before.append(earlier.end)
        target = self._slots[ticket.slot, : record.numel()]
        with work("copy" if urgent else "guess", ticket.layer, ticket.expert):
            ticket.begin, ticket.end = self._link.copy(target, record, urgent=urgent, after=before)
        self._written[ticket.slot] = ticket
        self._under_way[0 if urgent else 1].append(ticket)

    def _urgent_copy(self, job: int | None) -> CudaTicket | None:
        return next((ticket for ticket in self._under_way[0] if ticket.job == job), None)

    def _collect(self) -> None:
        """Count the copies that are complete and let their buffers go."""
        for queue in self._under_way:
            while queue and queue[0].done:
                ticket = queue.popleft()
                self._order.finished(ticket.job)
                self._count(ticket)
                self._let_go(ticket)

    def _count(self, ticket: CudaTicket) -> None:
        assert ticket.begin is not None
        assert ticket.end is not None
        seconds = ticket.begin.elapsed_time(ticket.end) / 1e3
        overlap = 0.0  # with the copy before it, on the other stream
        if self._last_end is not None:
            overlap = max(0.0, ticket.begin.elapsed_time(self._last_end) / 1e3)
        if overlap < seconds:
            self._busy_seconds += seconds - overlap
            self._last_end = ticket.end

    def _let_go(self, ticket: CudaTicket) -> None:
        ticket.over = True
        if self._written.get(ticket.slot) is ticket:
            del self._written[ticket.slot]
        if ticket.read is not None and self.tier.disk is not None:
            self.tier.disk.release(ticket.read)
