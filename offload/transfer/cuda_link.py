"""The link between host memory and one GPU: two copy streams beside the one that computes.

Knows: streams, events, in which order the device does what it was given. Does not know: experts,
slots, who is urgent (`offload.copy_order`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor


class Event(Protocol):
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
        self, target: Tensor, source: Tensor, *, urgent: bool, after: Sequence[Event]
    ) -> tuple[Event, Event]:
        """Give a copy to one of the queues; it waits for `after`. When it begins and ends."""

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy inside the device's memory, in the order of what compute is given."""

    def computed(self) -> Event:
        """When what compute was given so far is done."""

    def compute_waits(self, event: Event) -> None:
        """What compute is given from now on comes after `event`."""

    def synchronize(self) -> None:
        """Return when the device has done everything."""

    def moment(self) -> tuple[Event, float]:
        """An event that has just passed, and its `time.perf_counter`."""

    def free_cached(self) -> None:
        """Give memory that nothing uses back, so that a large piece can be had."""


class CudaLink:
    """One GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._demands = torch.cuda.Stream(device)
        self._guesses = torch.cuda.Stream(device)

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.device)

    def copy(
        self, target: Tensor, source: Tensor, *, urgent: bool, after: Sequence[Event]
    ) -> tuple[Event, Event]:
        stream = self._demands if urgent else self._guesses
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

    def computed(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def compute_waits(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def moment(self) -> tuple[Event, float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._demands)
        event.synchronize()
        return event, time.perf_counter()

    def free_cached(self) -> None:
        torch.cuda.empty_cache()

    def rate(self, sample: Tensor, repeats: int = 3) -> float:
        """Bytes/s of copying pinned host memory to the device."""
        target = torch.empty_like(sample, device=self.device)
        self.copy(target, sample, urgent=True, after=())[1].synchronize()
        spans = [self.copy(target, sample, urgent=True, after=()) for _ in range(repeats)]
        spans[-1][1].synchronize()
        return sample.nbytes * repeats / (spans[0][0].elapsed_time(spans[-1][1]) / 1e3)
