"""The host-planned engine: the plan of every MoE layer is made in Python, one sync a layer.

Knows: the order of things in a step: plan, start copies, compute what is here, wait, compute the
rest, reduce once. Does not know: who is evicted (`cache`), how bytes move (`offload.transfer`),
what they mean (`quant`).

Letters: T tokens, k experts a token, S = T * k cells, H hidden, I inner, E experts.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cache.cache import ExpertCache
from cache.lookahead import LookaheadBalance
from cache.plan import Use
from offload.errors import GenerationError
from offload.stats import Stats
from offload.transfer import Ticket, Transfer
from quant.matmul import matmul
from quant.pack import PackInfo
from quant.record import MatrixView, view_record


class Layer:
    """One MoE layer's experts, called by transformers in place of its own."""

    def __init__(self, engine: Engine, index: int, module: nn.Module, num_experts: int) -> None:
        self.engine = engine
        self.index = index
        self.module = module
        self.num_experts = num_experts
        self.router: nn.Module | None = None  # of this layer
        self.asked: tuple[Any, ...] = ()  # what this layer's router was last called with

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.engine.step(self, hidden, top_k_index, top_k_weights)

    def guess(self, hidden: Tensor) -> list[int]:
        """The experts this layer's router would choose for `hidden` [.., H] of one token."""
        rest = self.asked[1:]
        constant = all(isinstance(r, Tensor) and r.numel() == self.num_experts for r in rest)
        if self.router is None or not self.asked or not constant:  # depends on more than the state
            return []
        answer = self.router(hidden, *rest)
        if not isinstance(answer, tuple) or len(answer) < 3 or answer[2].is_floating_point():
            return []
        index = answer[2].flatten().tolist()  # sync: the plan is made on the host
        return [expert for expert in index if 0 <= expert < self.num_experts]

    def expert(self, x: Tensor, matrices: dict[str, MatrixView]) -> Tensor:
        """One expert's output [M, H] for its tokens `x` [M, H], before the router's weight."""
        module: Any = self.module  # what the experts seam promises is not in its type
        if module.has_gate:
            inner = module._apply_gate(matmul(x, matrices["gate_up_proj"]))  # [M, I]
        else:
            inner = module.act_fn(matmul(x, matrices["up_proj"]))  # [M, I]
        out = matmul(inner, matrices["down_proj"])  # [M, H]
        if not module.has_post_expert_norm:
            return out
        normed: Tensor = module.post_expert_norm(out)
        return normed


class Engine:
    """Serves the experts of a whole model from a cache of slots."""

    def __init__(
        self,
        info: PackInfo,
        cache: ExpertCache,
        transfer: Transfer,
        balance: LookaheadBalance | None,
    ) -> None:
        """With `balance` looking ahead stops while it does not pay; with None it never does."""
        self._info = info
        self.cache = cache
        self.transfer = transfer
        self._balance = balance
        self.layers: list[Layer] = []
        self._tickets: dict[
            int, Ticket
        ] = {}  # slot -> the copy into it that was not waited for yet
        self._in_flight: list[int] = []  # slots of look-ahead loads not yet seen to land
        self._views: dict[tuple[int, int], dict[str, MatrixView]] = {}  # (layout, slot)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._started = 0  # copies
        self.tokens = 0  # that went through the first layer
        self.closed = False

    def add_layer(self, module: nn.Module) -> Layer:
        """The next MoE layer of the model."""
        index = len(self.layers)
        layer = Layer(self, index, module, self._info.layers[index].num_experts)
        self.layers.append(layer)
        return layer

    def watch_routers(self, routers: Sequence[nn.Module | None]) -> None:
        """Look ahead with these routers, one for each layer; None where there is none to ask."""

        for layer, router in zip(self.layers, routers, strict=True):
            layer.router = router
            if router is not None:
                hook = functools.partial(_remember_asked, layer)
                self._hooks.append(router.register_forward_pre_hook(hook))

    def step(
        self, layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The experts' part of one layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        if self.closed:
            raise GenerationError("the model was closed: load it again")
        if layer.index == 0:
            self.tokens += hidden.shape[0]
        chosen = top_k_index.tolist()  # sync: the plan is made on the host
        cells_of = _cells_by_expert(chosen, layer.num_experts)
        experts = list(cells_of)
        needed_before = self.cache.statistics.layers[layer.index].needed_loads
        plan = self.cache.plan(layer.index, experts)
        cells: Tensor | None = None  # [S, H]
        try:
            for wave in plan.waves:
                for use in wave.loads:
                    self._start(layer.index, use, urgent=True)
                if wave is plan.waves[-1]:
                    self._look_ahead(layer)
                for use in (*wave.hits, *wave.loads):
                    matrices = self._ready(layer.index, use)
                    where = cells_of[use.expert]
                    out = layer.expert(_rows(hidden, where, len(chosen[0])), matrices)
                    if cells is None:
                        cells = out.new_zeros(top_k_index.numel(), out.shape[-1])
                    _put(cells, where, out)
                    self.transfer.release(use.slot)
        except BaseException:  # Ctrl-C included: the table may promise what no copy brought
            self._recover(layer.index, experts)
            raise
        if cells is None:  # every index was a sentinel
            return torch.zeros_like(hidden)
        self._weigh(layer.index, needed_before)
        weighted = cells.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)  # [T, k, H]
        return weighted.sum(dim=1).to(hidden.dtype)

    def _start(self, layer: int, use: Use, *, urgent: bool) -> None:
        self._started += 1
        self._tickets[use.slot] = self.transfer.start(layer, use.expert, use.slot, urgent=urgent)

    def _ready(self, layer: int, use: Use) -> dict[str, MatrixView]:
        """The matrices of an expert, once they have arrived."""
        ticket = self._tickets.pop(use.slot, None)
        if ticket is not None:
            begin = time.perf_counter()
            self.transfer.wait(ticket)
            self.cache.statistics.layers[layer].wait_seconds += time.perf_counter() - begin
            self.cache.landed(use.slot)
        key = (self._info.layers[layer].layout, use.slot)
        if key not in self._views:
            self._views[key] = view_record(self.transfer.slot(use.slot), self._info.layouts[key[0]])
        return self._views[key]

    def _look_ahead(self, layer: Layer) -> None:
        """Ask the next layer's router about this layer's hidden state; load what it would
        choose."""
        if not self._hooks or layer.index + 1 == len(self.layers) or not layer.asked:
            return
        if self._balance is not None and not self._balance.worthwhile:
            return
        begin = time.perf_counter()
        hidden = layer.asked[0]
        if hidden.numel() != hidden.shape[-1]:
            return  # with many tokens nearly every expert is chosen: guessing is no help
        self._note_landed()
        ahead = self.layers[layer.index + 1]
        experts = ahead.guess(hidden)
        for use in self.cache.look_ahead(ahead.index, experts, most=len(experts)):
            self._start(ahead.index, use, urgent=False)
            self._in_flight.append(use.slot)
        if self._balance is not None:
            self._balance.guessed(time.perf_counter() - begin)

    def _weigh(self, layer: int, needed_before: int) -> None:
        """Tell the balance what this step needed, where there is anything to weigh."""
        if self._balance is None or not self._hooks:
            return
        needed = self.cache.statistics.layers[layer].needed_loads - needed_before
        self._balance.step(needed, self._started, self.transfer.busy_seconds)

    def _note_landed(self) -> None:
        under_way = []
        for slot in self._in_flight:
            ticket = self._tickets.get(slot)
            if ticket is None or ticket.done:
                self.cache.landed(slot)
            else:
                under_way.append(slot)
        self._in_flight = under_way

    def _recover(self, layer: int, experts: Sequence[int]) -> None:
        """After a step that failed: let its copies end and forget what they brought."""
        for expert in experts:
            if self.cache.is_resident(layer, expert):
                ticket = self._tickets.pop(self.cache.table.slot_of((layer, expert)), None)
                if ticket is not None:
                    with contextlib.suppress(Exception):  # the first failure is the one to report
                        self.transfer.wait(ticket)
        self.cache.forget(layer, experts)

    def record_bytes(self, layer: int) -> int:
        return self._info.layout_of(layer).record_bytes

    def stats(self) -> Stats:
        """The figures of everything so far; subtract two to get what happened between them."""
        counts = self.cache.statistics
        loaded = (n.loads * self.record_bytes(i) for i, n in enumerate(counts.layers))
        return Stats(
            counts=counts.total(),
            layers=tuple(replace(layer) for layer in counts.layers),
            slots=self.cache.table.slots,
            total_experts=self._info.total_experts,
            bytes_loaded=sum(loaded),
            link_busy_seconds=self.transfer.busy_seconds,
            tokens=self.tokens,
        )

    def close(self) -> None:
        """Free the slots and end the copies; the model cannot be used afterwards."""
        if self.closed:
            return
        self.closed = True
        for hook in self._hooks:
            hook.remove()
        self._views.clear()
        self._tickets.clear()
        self.transfer.close()


def _remember_asked(layer: Layer, _: nn.Module, args: tuple[Any, ...]) -> None:
    layer.asked = args


def _cells_by_expert(chosen: list[list[int]], num_experts: int) -> dict[int, list[int]]:
    """Expert -> its cells (token * k + place), in order; an index past the experts is a
    sentinel."""
    cells: dict[int, list[int]] = {}
    cell = 0
    for places in chosen:
        for expert in places:
            if 0 <= expert < num_experts:
                cells.setdefault(expert, []).append(cell)
            cell += 1
    return cells


def _rows(hidden: Tensor, cells: list[int], k: int) -> Tensor:
    """The hidden states [M, H] of the tokens that `cells` belong to."""
    if hidden.shape[0] == 1:
        return hidden
    return hidden[[cell // k for cell in cells]]


def _put(cells: Tensor, where: list[int], out: Tensor) -> None:
    if len(where) == 1:
        cells[where[0]] = out[0]
    else:
        cells[where] = out
