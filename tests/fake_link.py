"""A fake device that does its work late, in any order its queues allow.

Copies really happen, at the moment the device gets to them: whoever forgets to wait sees old bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FakeEvent:
    def __init__(self, link: FakeLink) -> None:
        self._link = link
        self.at: float | None = None  # ms; None: has not passed

    def query(self) -> bool:
        self._link.some()
        return self.at is not None

    def synchronize(self) -> None:
        while self.at is None:
            assert self._link.one(), "the device waits for ever"

    def elapsed_time(self, end_event: FakeEvent, /) -> float:
        assert self.at is not None
        assert end_event.at is not None
        return end_event.at - self.at


class FakeLink:
    """With `eager` compute happens when it is called, as on a CPU, and waits on the spot."""

    def __init__(self, seed: int = 0, *, eager: bool = True) -> None:
        self.device = torch.device("cpu")
        self.memory_left = 1 << 40
        self.stands_still = False  # until somebody waits
        self._eager = eager
        self._chooser = random.Random(seed)
        self._clock = 0.0
        self.queues: dict[str, deque[tuple[Sequence[FakeEvent], Callable[[], None]]]] = {
            name: deque() for name in ("urgent", "guesses", "compute")
        }

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        if slots * slot_bytes > self.memory_left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
        return torch.full((slots, slot_bytes), 255, dtype=torch.uint8)

    def copy(
        self, target: Tensor, source: Tensor, *, urgent: bool, after: Sequence[FakeEvent]
    ) -> tuple[FakeEvent, FakeEvent]:
        begin, end = FakeEvent(self), FakeEvent(self)
        queue = self.queues["urgent" if urgent else "guesses"]
        queue.append((after, lambda: self._pass(begin)))
        queue.append(((), lambda: (target.copy_(source), self._pass(end))[1]))
        return begin, end

    def move(self, target: Tensor, source: Tensor) -> None:
        self.compute(lambda: (target.copy_(source), None)[1])

    def computed(self) -> FakeEvent:
        event = FakeEvent(self)
        self.compute(lambda: self._pass(event))
        return event

    def compute_waits(self, event: FakeEvent) -> None:
        if self._eager:
            event.synchronize()
        else:
            self.queues["compute"].append(((event,), lambda: None))

    def compute(self, call: Callable[[], None]) -> None:
        """Queue `call` on the device."""
        if self._eager:
            call()
        else:
            self.queues["compute"].append(((), call))

    def synchronize(self) -> None:
        while self.one():
            pass

    def free_cached(self) -> None:
        pass

    def some(self) -> None:
        """The device does a few things or none."""
        if not self.stands_still:
            for _ in range(self._chooser.randrange(4)):
                self.one()

    def one(self) -> bool:
        """The device does one thing; whether there was one to do."""
        able = [
            queue
            for queue in self.queues.values()
            if queue and all(event.at is not None for event in queue[0][0])
        ]
        assert able or not any(self.queues.values()), "queues wait for each other"
        if not able:
            return False
        self._clock += 1.0
        self._chooser.choice(able).popleft()[1]()
        return True

    def _pass(self, event: FakeEvent) -> None:
        event.at = self._clock
