"""Moving records into GPU slots.

Knows: pinned memory, the copy stream, events. Does not know: which expert belongs where (`cache`),
nor what a record means (`quant`).

Records are copied once from the mapped pack into host memory that is then registered with CUDA
("pinned"); from there the copy engine fetches them while kernels run. What `ram` has no room for
stays in the mapping and is copied from there, slower.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import psutil
import torch
from torch import Tensor

from offload.budget import SHARE, gib
from offload.marks import NO_MARKS, Marks
from offload.transfer import Ticket
from quant.pack import Pack

logger = logging.getLogger("offload")


class CudaTicket:
    """A copy on the copy stream; complete when its second event is."""

    __slots__ = ("begin", "end", "expert", "layer", "urgent")

    def __init__(self, layer: int, expert: int, urgent: bool) -> None:
        self.layer, self.expert, self.urgent = layer, expert, urgent
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    @property
    def done(self) -> bool:
        return bool(self.end.query())


class CudaTransfer:
    """Slots in GPU memory, filled from pinned host memory on a stream of their own.

    The copy stream works in order: an urgent copy waits for the look-ahead copies begun before it,
    at most as many as a token has experts.
    """

    overtakes = False

    def __init__(self, pack: Pack, slots: int, device: torch.device, ram: int | None) -> None:
        self.device = device
        self._pack = pack
        self._slots = torch.empty(slots, pack.info.slot_bytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._released: dict[int, torch.cuda.Event] = {}  # slot -> when compute was done with it
        self._timed: deque[CudaTicket] = deque()  # not yet counted in `busy_seconds`
        self._busy_seconds = 0.0
        self._marks: Marks = NO_MARKS
        self._zero: torch.cuda.Event | None = None  # when `_zero_moment` was, on the device
        self._zero_moment = 0.0
        self._copied_bytes = 0  # from the pack into host memory
        self._pinned: list[Tensor] = []
        self._pinning_failed = False
        budget = int(psutil.virtual_memory().available * SHARE) if ram is None else ram
        self._host = [self._host_records(layer, budget) for layer in range(len(pack.info.layers))]
        mapped = sum(records is None for records in self._host)
        if mapped:
            logger.warning(
                "%d of %d MoE layers do not fit in %s of RAM and are read from disk: raise "
                "--ram, or lower --expert-bits",
                mapped,
                len(self._host),
                gib(budget),
            )

    def _host_records(self, layer: int, budget: int) -> Tensor | None:
        """A checked copy [E, record_bytes] of a layer's records in pinned memory, or None: no
        room."""
        info = self._pack.info
        experts, record_bytes = info.layers[layer].num_experts, info.layout_of(layer).record_bytes
        if self._copied_bytes + experts * record_bytes > budget:
            return None
        # Not pin_memory=True: torch's allocator rounds up to a power of two, 1.85 times the memory.
        records = torch.empty(experts, record_bytes, dtype=torch.uint8)
        for expert in range(experts):
            self._pack.check_record(layer, expert)
            records[expert] = self._pack.record(layer, expert)
        result = torch.cuda.cudart().cudaHostRegister(records.data_ptr(), records.nbytes, 0)
        self._copied_bytes += records.nbytes
        if int(result) == 0:
            self._pinned.append(records)
        elif not self._pinning_failed:
            self._pinning_failed = True
            logger.warning(
                "cannot pin host memory (CUDA error %d): copies will be about three times "
                "slower; raise the limit of locked memory (ulimit -l), or on Windows/WSL lower "
                "--ram",
                int(result),
            )
        return records

    @property
    def marks(self) -> Marks:
        return self._marks

    @marks.setter
    def marks(self, marks: Marks) -> None:
        """Tell `marks` of copies; events know only distances, so one is tied to the clock."""
        torch.cuda.synchronize(self.device)
        _ = self.busy_seconds  # tells whoever listened until now
        self._marks = marks
        self._zero = None
        if marks is not NO_MARKS:
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record(self._stream)
            self._zero.synchronize()
            self._zero_moment = time.perf_counter()

    @property
    def busy_seconds(self) -> float:
        while self._timed and self._timed[0].done:
            ticket = self._timed.popleft()
            seconds = ticket.begin.elapsed_time(ticket.end) / 1e3
            self._busy_seconds += seconds
            if self._zero is not None:
                begin = self._zero_moment + self._zero.elapsed_time(ticket.begin) / 1e3
                self._marks.copied(ticket.layer, ticket.expert, ticket.urgent, begin, seconds)
        return self._busy_seconds

    @property
    def slots(self) -> Tensor:
        return self._slots

    def slot(self, index: int) -> Tensor:
        return self._slots[index]

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> CudaTicket:
        host = self._host[layer]
        record = self._pack.record(layer, expert) if host is None else host[expert]
        if host is None:
            self._pack.check_record(layer, expert)
        ticket = CudaTicket(layer, expert, urgent)
        with torch.cuda.stream(self._stream):
            released = self._released.pop(slot, None)
            if released is not None:
                self._stream.wait_event(released)
            ticket.begin.record(self._stream)
            self._slots[slot, : record.numel()].copy_(record, non_blocking=True)
            ticket.end.record(self._stream)
        self._timed.append(ticket)
        if len(self._timed) > 4096:
            _ = self.busy_seconds  # counts and drops the finished ones
        return ticket

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, CudaTicket)
        torch.cuda.current_stream(self.device).wait_event(ticket.end)

    def drop(self, ticket: Ticket) -> bool:
        return False  # what the stream was given it does, before the copy that follows

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)
        self._released.clear()

    def release(self, slot: int) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._released[slot] = event

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        for records in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(records.data_ptr())
        self._pinned.clear()
        self._host.clear()
        self._slots = torch.empty(0, 0, dtype=torch.uint8, device=self.device)
