"""The device-planned half of the engine: one token's step decided without asking the host."""

# k experts a token, H hidden

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offload.cache.cache import CacheState
from offload.cache.statistics import LayerCounts
from offload.engine.device.gather import gather
from offload.engine.device.table import Places, Table, add_counters
from offload.engine.layer import Call, Layer
from offload.quant.experts import decode, kernels_work
from offload.quant.matmul import launching_on
from offload.transfer.base import Transfer

logger = logging.getLogger("offload")


class Lanes:
    """Two lanes of work: the stream in use computes, a second one fetches records.

    Both can be captured in a CUDA graph. On a CPU there is one lane.
    """

    def __init__(self, device: torch.device) -> None:
        # A fetch has few blocks of threads. They go before the many of compute, or else the PCIe
        # link stands still while those run.
        self._link = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def link(self) -> AbstractContextManager[object]:
        """Work queued inside goes to the link's lane."""
        return contextlib.nullcontext() if self._link is None else torch.cuda.stream(self._link)

    def fork(self) -> None:
        """Make later work on the link's lane wait for all work queued on compute so far."""
        if self._link is not None:
            self._link.wait_stream(torch.cuda.current_stream(self._link.device))

    def mark(self) -> torch.cuda.Event | None:
        """A point in the link's lane, to be asked for inside `link()`."""
        return None if self._link is None else self._link.record_event()

    def come_together(self) -> None:
        """Make compute wait until the link's lane is idle.

        This is for a step that broke off between forking and joining. A capture that the lane
        was not forked into leaves the lane out.
        """
        if self._link is None:
            return
        with self.link():
            forked = torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self._link.device):
            if forked == torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().wait_stream(self._link)

    def join(self, point: torch.cuda.Event | None) -> None:
        """Make compute wait until the link's lane has come to `point`."""
        if self._link is not None and point is not None:
            torch.cuda.current_stream(self._link.device).wait_event(point)


class DevicePlanned:
    """Serves one token's calls from the table of slots that the device keeps.

    The copy of an expert that the next layer will probably want goes beside the compute, and is
    joined before that layer needs it.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        transfer: Transfer,
        *,
        looks_ahead: bool,
        places: Places,
        addresses: Tensor,
    ) -> None:
        """`addresses` [L, E] int64 say where each record is in memory that `transfer.device` can
        read. `layers` is filled later."""
        self.table = Table(places, transfer.device)
        self.fewest_slots = 2 * places.k  # fewer slots cannot be planned for here
        self.computes: bool | None = None  # whether kernels compute every layer; None: not known
        self.looping = False  # a decode loop runs the steps, and says when it is over
        self.counts_come = False  # a decode loop brings the counts, so nobody has to wait for them
        self._layers, self._transfer = layers, transfer
        self._addresses = addresses.to(transfer.device)
        self._lanes = Lanes(transfer.device)
        self._looks_ahead = looks_ahead
        self._guess_decided: torch.cuda.Event | None = None
        self._guess_here: torch.cuda.Event | None = None
        self._held: tuple[Tensor, ...] = ()  # tensors that the link's lane still reads
        self._counted = [0] * len(self.counts())  # the part of the device's counts already added

    def see(self, dtype: torch.dtype) -> None:
        """Learn the first time whether there are kernels for hidden states of this `dtype`."""
        if self.computes is None:
            device = self._transfer.device
            # The reference that stands in for missing kernels asks the device for every slot.
            self.computes = all(kernels_work(at.program, dtype, device) for at in self._layers)
            if not self.computes:
                logger.warning(
                    "the CPU decides what to load: there are no GPU kernels for these experts"
                )

    def serve(self, call: Call) -> Tensor:
        """The experts' part [1, H] of one layer, queued on the device."""
        with launching_on(self._transfer.device):
            return self._serve(call)

    def _serve(self, call: Call) -> Tensor:
        layer, at, table, lanes = call.layer, call.layer.index, self.table, self._lanes
        if at == 0 and not self.looping:
            table.halted.zero_()
            self.counts_come = False
        index = call.index.reshape(-1)  # [k]
        hits, loads = table.hits[at, : len(index)], table.loads[at, : len(index)]
        lanes.join(self._guess_decided)
        table.decide(at, layer.num_experts, index)
        lanes.fork()
        with lanes.link():
            self.fetch(layer, index, loads)
            loaded = lanes.mark()
            guessed_before, held_before = self._guess_here, self._held
            self._look_ahead(layer)
        cells = call.hidden.new_zeros(len(index), layer.layout.matrices[-1].rows)  # [k, H]
        lanes.join(guessed_before)
        decode(call.hidden, self._transfer.slots, hits, layer.program, cells)
        lanes.join(loaded)
        decode(call.hidden, self._transfer.slots, loads, layer.program, cells)
        del held_before  # until here the link's lane may have read these tensors
        module: Any = layer.module  # what the experts seam promises is not in its type
        if module.has_post_expert_norm:
            cells = module.post_expert_norm(cells)  # the norm of a cell of zeros is zeros
        return call.reduced(cells)

    def fetch(self, layer: Layer, experts: Tensor, where: Tensor) -> None:
        """Queue copies of the records of `experts` [k] of a layer into the slots `where` [k]; -1
        is no copy."""
        addresses, size = self._addresses[layer.index], layer.layout.record_bytes
        gather(experts, where, addresses, self._transfer.slots, size)

    def _look_ahead(self, layer: Layer) -> None:
        """Ask the next layer's router, and fetch its choice after the loads of this layer."""
        self.forget_queued()
        hidden, layer.asked = layer.asked, None
        if not self._looks_ahead or hidden is None or layer.index + 1 == len(self._layers):
            return
        later = self._layers[layer.index + 1]
        index = later.ask(layer.as_seen_by(later, hidden))
        if index is None:
            return
        index = index.reshape(-1)
        self.table.look_ahead(later.index, later.num_experts, index)
        self._guess_decided = self._lanes.mark()
        where = self.table.guess_loads[later.index, : len(index)]
        self.fetch(later, self.table.guesses[later.index, : len(index)], where)
        self._guess_here = self._lanes.mark()
        self._held = (hidden, index)

    def come_together(self) -> None:
        """After a step broke off, make later work wait for all that the step had queued."""
        self._lanes.come_together()

    def forget_queued(self) -> None:
        """Forget the guess: none is under way, or the work queued last never ran."""
        self._guess_decided = self._guess_here = None
        self._held = ()

    def take_over(self, state: CacheState) -> None:
        """Continue from the state of the cache."""
        self.table.upload(state, self._counted)

    def counts(self) -> list[int]:
        """The table's present counts. Waits for the device."""
        counts: list[int] = self.table.counts.tolist()
        return counts

    def add_new(self, counts: list[int], layers: list[LayerCounts]) -> int:
        """Add to `layers` the part of `counts` that was not added before; how many new tokens."""
        if counts[0] < self._counted[0]:
            return 0
        new = [now - before for now, before in zip(counts, self._counted, strict=True)]
        self._counted = counts
        add_counters(new[1:], layers)
        return new[0]

    def resize(self, slots: int) -> None:
        """Note that there are `slots` now, all of them empty."""
        self.table = Table(replace(self.table.places, slots=slots), self._transfer.device)
        if slots < self.fewest_slots and self.computes:
            self.computes = False
            logger.warning(
                "the CPU decides what to load from now on: the GPU needs %d slots for that",
                self.fewest_slots,
            )
