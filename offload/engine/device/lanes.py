"""The two lanes of a device-planned step: compute, and the link beside it.

Knows: streams and events, and that a CPU has neither. Does not know: what runs in them.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


class Lanes:
    """The stream in use is for compute; a second one fetches records. Both can be captured."""

    def __init__(self, device: torch.device) -> None:
        # Its few blocks of threads go before compute's many, or the link stands still meanwhile.
        self._link = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def device(self) -> AbstractContextManager[object]:
        """Kernels launched inside run on the device: Triton asks which one is in use, not where
        tensors are."""
        return (
            contextlib.nullcontext() if self._link is None else torch.cuda.device(self._link.device)
        )

    def link(self) -> AbstractContextManager[object]:
        """What is queued inside goes to the link's lane."""
        return contextlib.nullcontext() if self._link is None else torch.cuda.stream(self._link)

    def fork(self) -> None:
        """What the link's lane is given from now on comes after all that compute was given."""
        if self._link is not None:
            self._link.wait_stream(torch.cuda.current_stream(self._link.device))

    def mark(self) -> torch.cuda.Event | None:
        """A point in the link's lane, to be asked for inside `link()`."""
        if self._link is None:
            return None
        event = torch.cuda.Event()
        event.record(self._link)
        return event

    def come_together(self) -> None:
        """Compute goes on when the link's lane is idle: for a step that broke off between forking
        and joining. A capture that it had not forked into does not learn of the lane."""
        if self._link is None:
            return
        with self.link():
            forked = torch.cuda.is_current_stream_capturing()
        with self.device():
            if forked == torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().wait_stream(self._link)

    def join(self, point: torch.cuda.Event | None) -> None:
        """Compute goes on when the link's lane has come to `point`."""
        if point is not None:
            assert self._link is not None
            torch.cuda.current_stream(self._link.device).wait_event(point)
