"""Small tensors on their way from the device, without waiting for what is queued after them.

Knows: pinned memory and events. Does not know: what the numbers mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Brings small tensors to the host, two on their way at a time."""

    def __init__(self, like: Tensor) -> None:
        cuda = like.device.type == "cuda"
        self._places = [torch.empty_like(like, device="cpu", pin_memory=cuda) for _ in range(2)]
        self._here = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._sent = self._read = 0

    def send(self, what: Tensor) -> None:
        """Queue a copy of `what`, as it is after all that is queued."""
        at = self._sent % 2
        self._sent += 1
        assert self._sent - self._read <= 2, "nobody has read the one before"
        self._places[at].copy_(what, non_blocking=True)
        event = self._here[at]
        if event is not None:
            event.record(torch.cuda.current_stream(what.device))  # of another card it says nothing

    def read(self) -> list[int]:
        """The oldest that was sent and not read."""
        at = self._read % 2
        self._read += 1
        event = self._here[at]
        if event is not None:
            event.synchronize()  # sync: the text is made on the host, a step behind
        values: list[int] = self._places[at].tolist()
        return values
