"""Naive offloading: the chosen experts are copied whole, one after the other, and nothing is kept.

Knows: synchronous copies of records from host memory. Does not know: caches; the engine around it
and its kernels are the same as everywhere else, so that the cache alone makes the difference.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from offload.quant.pack import Pack
from offload.transfer.base import Ticket

HOST_BYTES = 2**30  # of host memory that records are copied from, in turn: beyond any CPU's cache


class Copied:
    """A copy that is over."""

    done = True


class NaiveTransfer:
    """Copies a record when it is asked for, and returns when it is there.

    Which record's bytes arrive does not matter to a speed, so a few wait in host memory.
    """

    overtakes = False
    streams_in_place = in_place = False

    def __init__(self, pack: Pack, slots: int, device: torch.device, *, pinned: bool) -> None:
        self.device = device
        self._pack = pack
        size = pack.info.slot_bytes
        self._slots = torch.zeros(slots, size, dtype=torch.uint8, device=device)
        count = max(2, min(pack.info.layers[0].num_experts, HOST_BYTES // size))
        self._host = torch.empty(count, size, dtype=torch.uint8, pin_memory=pinned)
        for at, record in enumerate(self._host):
            source = pack.record(0, at % pack.info.layers[0].num_experts)
            record[: len(source)] = source
        self._busy_seconds = 0.0

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds

    @property
    def slots(self) -> Tensor:
        return self._slots

    def slot(self, index: int) -> Tensor:
        return self._slots[index]

    def addresses(self) -> None:
        """A kernel that fetches by itself would not be naive."""

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> Copied:
        begin = time.perf_counter()
        record = self._host[(layer * 7 + expert) % len(self._host)]
        self._slots[slot].copy_(record)  # sync: that is what naive means
        self._busy_seconds += time.perf_counter() - begin
        return Copied()

    def wait(self, ticket: Ticket) -> None:
        """Nothing to wait for."""

    def drop(self, ticket: Ticket) -> bool:
        return False

    def drain(self) -> None:
        """Nothing is under way."""

    def release(self, slot: int) -> None:
        """The next copy is on the same stream."""

    def resize(self, slots: int, staging: int) -> None:
        self._slots = self._slots.new_zeros(slots + staging, self._slots.shape[1])

    def close(self) -> None:
        self._slots = torch.empty(0, 0, dtype=torch.uint8, device=self.device)
        self._host = torch.empty(0, 0, dtype=torch.uint8)
