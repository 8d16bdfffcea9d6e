"""The device-planned engine: one token's step without asking the host anything.

Knows: the order of things in such a step, and when the host plans instead. Does not know: how the
kernels decide (`offload.device.kernels`), what a record means (`quant`).

One token is planned on the device; prompts, batches, traces, timelines and warm starts go through
the host-planned engine this one is built on. The state of the cache is in one place at a time and
moves whole, so that decisions are those of the host-planned engine alone. A copy of what a later
layer is guessed to want goes beside the compute and is joined before that layer needs it.

Letters: k experts a token, H hidden.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offload.cache.cache import ExpertCache
from offload.engine.compute import Compute, program_of
from offload.engine.device.gather import gather
from offload.engine.device.places import Places
from offload.engine.device.table import Table, add_counters
from offload.engine.engine import Engine, fewer_slots
from offload.engine.layer import Layer
from offload.engine.stats import Stats
from offload.errors import GenerationError
from offload.quant.experts import decode, kernels_work
from offload.quant.pack import PackInfo
from offload.quant.program import Program
from offload.transfer.base import NO_MARKS, Transfer


class SlotDecode:
    """Computes one token's experts from slots, without asking the host anything."""

    def __init__(self, info: PackInfo) -> None:
        self._info = info
        self._programs: dict[int, Program] = {}

    def __call__(
        self, layer: Layer, hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, cells: Tensor
    ) -> None:
        """Fill `cells` [k, H] for `hidden` [1, H]; where `slot_of_cell` [k] is -1 they stay.

        What comes before a norm that some models have after each expert.
        """
        decode(hidden, slots, slot_of_cell, self._program(layer), cells)

    def works(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether there are kernels for this layer; the reference would ask for every slot."""
        return kernels_work(self._program(layer), dtype, device)

    def _program(self, layer: Layer) -> Program:
        if layer.index not in self._programs:
            layout = self._info.layout_of(layer.index)
            self._programs[layer.index] = program_of(layer.module, layout)
        return self._programs[layer.index]


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


logger = logging.getLogger("offload")


class DeviceEngine(Engine):
    """An `Engine` that plans one token's steps on the device."""

    _cache: ExpertCache  # of one card

    def __init__(
        self,
        info: PackInfo,
        cache: ExpertCache,
        transfer: Transfer,
        compute: Compute,
        lookahead: bool = False,
        staging: int = 0,
        *,
        places: Places,
        addresses: Tensor,
        decode: SlotDecode,
    ) -> None:
        """`addresses` [L, E] int64 say where each record is in memory that `transfer.device` can
        read. Guesses are not weighed: on the device they cost the host nothing."""
        self._table = Table(places, transfer.device)
        self._fewest_slots = 2 * places.k  # with which steps can be planned here
        self._planned_here = False  # whether the table is what holds, and not the cache
        self._addresses = addresses.to(transfer.device)
        self._decode = decode
        self._lanes = Lanes(transfer.device)
        self._guesses = lookahead
        self._ahead_planned: torch.cuda.Event | None = None
        self._ahead_here: torch.cuda.Event | None = None
        self._held: tuple[Tensor, ...] = ()  # what the link's lane still reads
        self._counted = [0] * len(self._table.counts.tolist())  # of the device's, already added
        self._computes: bool | None = None  # whether kernels compute every layer; None: not known
        self._looping = False  # steps are those of a decode loop, which says when it is over
        self.counts_come = False  # a decode loop brings the counts: nobody needs to wait for them
        super().__init__(info, cache, transfer, compute, None, lookahead, staging)

    @property
    def cache(self) -> ExpertCache:
        """The cache, with what the device decided so far. Waits for the device."""
        self.plan_on_host()
        return self._cache

    @property
    def table(self) -> Table:
        return self._table

    def _serve(
        self, layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        if self._computes is None:
            self._computes = self._kernels_work(hidden.dtype)
        one = hidden.shape[0] == 1 and not self.prompt
        if one and (self._planned_here or (layer.index == 0 and self.plan_on_device())):
            with self._lanes.device():
                return self._step(layer, hidden, top_k_index, top_k_weights)
        self.plan_on_host()
        return super()._serve(layer, hidden, top_k_index, top_k_weights)

    def _step(
        self, layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        at, table, lanes = layer.index, self._table, self._lanes
        if at == 0 and not self._looping:
            table.halted.zero_()
            self.counts_come = False
        index = top_k_index.reshape(-1)  # [k]
        hits, loads = table.hits[at, : len(index)], table.loads[at, : len(index)]
        lanes.join(self._ahead_planned)
        table.decide(at, layer.num_experts, index)
        lanes.fork()
        with lanes.link():
            self._fetch(at, index, loads)
            loaded = lanes.mark()
            guessed_before, held_before = self._ahead_here, self._held
            self._look_ahead(layer)
        out = self._info.layout_of(at).matrices[-1].rows
        cells = hidden.new_zeros(len(index), out)  # [k, H]
        lanes.join(guessed_before)
        self._decode(layer, hidden, self.transfer.slots, hits, cells)
        lanes.join(loaded)
        self._decode(layer, hidden, self.transfer.slots, loads, cells)
        del held_before  # until here the link's lane may have read it
        module: Any = layer.module  # what the experts seam promises is not in its type
        if module.has_post_expert_norm:
            cells = module.post_expert_norm(cells)  # of zeros: zeros
        weighted = cells.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)  # [1, k, H]
        return weighted.sum(dim=1).to(hidden.dtype)

    def _fetch(self, layer: int, experts: Tensor, loads: Tensor) -> None:
        size = self.record_bytes(layer)
        gather(experts, loads, self._addresses[layer], self.transfer.slots, size)

    def _look_ahead(self, layer: Layer) -> None:
        """Ask the next layer's router, and fetch its choice behind what this layer wants."""
        self._ahead_planned = self._ahead_here = None
        self._held = ()
        hidden, layer.asked = layer.asked, None
        if not self._guesses or hidden is None or layer.index + 1 == len(self.layers):
            return
        later = self.layers[layer.index + 1]
        index = later.ask(layer.as_seen_by(later, hidden))
        if index is None:
            return
        index = index.reshape(-1)
        self._table.look_ahead(later.index, later.num_experts, index)
        self._ahead_planned = self._lanes.mark()
        where = self._table.guess_loads[later.index, : len(index)]
        self._fetch(later.index, self._table.guesses[later.index, : len(index)], where)
        self._ahead_here = self._lanes.mark()
        self._held = (hidden, index)

    def _kernels_work(self, dtype: torch.dtype) -> bool:
        device = self.transfer.device
        if all(self._decode.works(layer, dtype, device) for layer in self.layers):
            return True
        logger.warning("without kernels for its experts the model's steps are planned on the host")
        return False

    @contextlib.contextmanager
    def loop(self) -> Iterator[bool]:
        """A decode loop runs a step inside; whether the device plans it."""
        with self._lock:
            if self.closed:
                raise GenerationError("the model was closed: load it again")
            self._looping = True
            try:
                yield self.plan_on_device()
            finally:
                self._looping = False

    def come_together(self) -> None:
        """A step broke off: what is queued from now on comes after all that it had queued."""
        self._lanes.come_together()

    def broke_off(self) -> None:
        """What was queued last never happened: a capture failed."""
        self._ahead_planned = self._ahead_here = None
        self._held = ()
        self._broken_off = False

    def plan_on_device(self) -> bool:
        """Give the table what the cache knows, between two tokens; False: the host has to plan."""
        if self._planned_here:
            return True
        if not self._computes or self._recorder is not None or self._marks is not NO_MARKS:
            return False
        if self._cold:  # a warm start goes on
            return False
        for ticket, _ in self._tickets.values():
            self.transfer.wait(ticket)
        self._tickets.clear()
        self._table.upload(self._cache.state(), self._counted)
        self._planned_here = True
        return True

    def plan_on_host(self) -> None:
        """Give the cache what the table knows. Waits for the device."""
        if not self._planned_here:
            return
        self.come_together()
        self.count(self._table.counts.tolist())
        self._cache.adopt(self._table.download())
        self._planned_here = False

    def count(self, counts: list[int]) -> None:
        """Add what the device counted since it was told last: `Table.counts` of some moment, maybe
        of one before the host was told."""
        if counts[0] < self._counted[0]:
            return
        new = [now - before for now, before in zip(counts, self._counted, strict=True)]
        self._counted = counts
        self.tokens += new[0]
        layers = self._cache.statistics.layers
        loads = [layer.loads for layer in layers]
        add_counters(new[1:], layers)
        for layer, before in enumerate(loads):
            self._kept[layer] += layers[layer].loads - before

    def stats(self) -> Stats:
        if self._planned_here and not self.counts_come:
            self.count(self._table.counts.tolist())
        return super().stats()

    def spares(self, shortage: int) -> bool:
        """Whether steps can still be planned here when `shortage` bytes are given back."""
        left = fewer_slots(self._cache.table.slots, shortage, self._info.slot_bytes)
        return left >= self._fewest_slots

    @torch.inference_mode(False)
    def give_back(self, shortage: int) -> None:
        self.plan_on_host()
        super().give_back(shortage)
        slots = self._cache.table.slots
        self._table = Table(replace(self._table.places, slots=slots), self.transfer.device)
        if slots < self._fewest_slots and self._computes:
            self._computes = False
            logger.warning(
                "with fewer than %d slots steps are planned on the host", self._fewest_slots
            )

    def _start_over(self) -> None:
        if self._planned_here:
            self.count(self._table.counts.tolist())
        self._planned_here = False
        self.broke_off()
        super()._start_over()

    def close(self) -> None:
        if not self.closed:
            self.plan_on_host()
        super().close()
