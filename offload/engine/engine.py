"""The host-planned engine: the plan of every MoE layer is made in Python.

One sync a layer, two where it looks ahead.

Knows: the order of things in a step: plan, start copies, compute what is here, wait, compute the
rest, reduce once. Does not know: who is evicted (`cache`), how bytes move (`offload.transfer`),
what they mean (`quant`).

Letters: T tokens, k experts a token, S = T * k cells, H hidden, I inner, E experts.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from offload.cache.decision import Use
from offload.cache.early import absent, nearly_all
from offload.cache.guesses import LookaheadBalance
from offload.cache.interface import Cache
from offload.cache.policies import Key
from offload.cache.sharded import staging_of
from offload.cache.staging import Kept, Step
from offload.cache.trace.trace import Guess
from offload.engine.ahead import Ahead
from offload.engine.compute import Compute
from offload.engine.layer import Layer
from offload.engine.recording import Recorder
from offload.engine.stats import Stats
from offload.errors import NO_MEMORY, GenerationError
from offload.quant.pack import PackInfo
from offload.transfer.base import NO_MARKS, Marks, Ticket, Transfer
from offload.units import gib

logger = logging.getLogger("offload")

SLACK = 64 << 20  # bytes given back beyond those that were missing, or a quarter of them
WARM_AT_ONCE = 4  # copies a step, where an urgent one cannot overtake them


class Engine:
    """Serves the experts of a whole model from a cache of slots."""

    def __init__(
        self,
        info: PackInfo,
        cache: Cache,
        transfer: Transfer,
        compute: Compute,
        balance: LookaheadBalance | None,
        lookahead: bool = False,
        staging: int = 0,
    ) -> None:
        """With `balance` looking ahead stops while it does not pay; with None it never does.

        `staging`: rows that `transfer` has past the slots, for prompts; with none a prompt is
        served in waves.
        """
        self._info = info
        self._cache = cache
        self.transfer = transfer
        self._staging = staging_of(cache, staging)
        self.layers: list[Layer] = []
        start = functools.partial(self._start, urgent=False)
        self._ahead = Ahead(self.layers, cache, lookahead, balance, start)
        # slot -> unawaited copy, its layer; None: of what was counted when it came to a row
        self._tickets: dict[int, tuple[Ticket, int | None]] = {}
        self._cold: deque[Key] = deque()  # hot experts of the run before, not begun to load
        self._recorder: Recorder | None = None
        self.prompt: bool | None = None  # whether prefill is running; None: not known
        self._compute = compute
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._started = 0  # copies
        self._kept = [0] * len(info.layers)  # of them those of each layer that were not given up
        # A step at a time, whoever calls the model. Ctrl-C cannot leave it taken: Python looks for
        # signals after the call that releases it, not before.
        self._lock = threading.RLock()
        self._broken_off = False  # the step before did not come to its end
        self.tokens = 0  # that went through the first layer
        self.closed = False
        self._marks: Marks = NO_MARKS

    @property
    def cache(self) -> Cache:
        """Who is resident."""
        return self._cache

    def tell(self, marks: Marks) -> None:
        """Tell `marks` when steps and copies happen."""
        self._marks = self.transfer.marks = marks

    def add_layer(self, module: nn.Module) -> Layer:
        """The next MoE layer of the model."""
        index = len(self.layers)
        layer = Layer(self.step, index, module, self._info.layers[index].num_experts)
        self.layers.append(layer)
        return layer

    def watch_calls(self, model: nn.Module) -> None:
        """Notice when the model reads a prompt: a call of several positions."""
        self._hooks.append(model.register_forward_pre_hook(self._note_call, with_kwargs=True))

    def _note_call(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        for given in (*args[:1], named.get("input_ids"), named.get("inputs_embeds")):
            if isinstance(given, Tensor):
                self.prompt = given.shape[1] > 1
                return

    @property
    def watches_routers(self) -> bool:
        return any(layer.router is not None for layer in self.layers)

    def watch_routers(self, model: nn.Module, routers: Sequence[nn.Module | None]) -> None:
        """Look ahead with these routers, one for each layer; None where there is none to ask."""
        owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for layer, router in zip(self.layers, routers, strict=True):
            if router is not None:
                self._hooks.append(layer.watch(model, router, owned))

    def step(
        self, layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The experts' part of one layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        with self._lock:
            if self.closed:
                raise GenerationError("the model was closed: load it again")
            if hidden.requires_grad:
                raise GenerationError("slots are reused, so gradients cannot be had: use no_grad()")
            if self._broken_off:
                self._start_over()
                self._cold.extend(self.cache.heat.hottest(self.cache.table.slots))
            self._broken_off = True  # unless it is reached that it is not: Ctrl-C comes anywhere
            out = self._serve(layer, hidden, top_k_index, top_k_weights)
            self._broken_off = False
            return out

    def _serve(
        self, layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        self._marks.mark("dense", layer.index)
        if layer.index == 0:
            self.tokens += hidden.shape[0]
        if self._cold:
            self._warm_some()
        chosen = top_k_index.tolist()  # sync: the plan is made on the host
        cells_of = _cells_by_expert(chosen, layer.num_experts)
        prompt = len(chosen) > 1 if self.prompt is None else self.prompt
        counts = self.cache.statistics.layers[layer.index]
        needed_before = counts.needed_loads
        admit = _admit(chosen[-1], cells_of) if prompt and self._staging.rows else None
        decision = self.cache.decide(layer.index, list(cells_of), prompt=prompt, admit=admit)
        guesses: list[Guess] = []
        cells = hidden.new_zeros(top_k_index.numel(), hidden.shape[-1])  # [S, H]
        steps = self._staging.steps(decision)
        # Each load is in one step, and those that were not begun before in the `begin` of one.
        counts.early_loads_right += sum(len(step.loads) - len(step.begin) for step in steps)
        early = [] if admit is None else self._surely_next(layer, len(cells_of))
        for step in steps:
            for use in step.begin:
                self._start(layer.index, use, urgent=True)
            if step is steps[-1]:
                guesses = self._ahead.look(layer, cells_of if len(chosen) == 1 else None)
                self._begin_early(layer.index + 1, early, halves=1 if step.beside else 2)
            self._marks.mark("plan", layer.index)
            for uses in self._turns(step):
                for use in uses:
                    self._wait(layer.index, use)
                self._marks.mark("wait", layer.index)
                self._compute.run(layer, uses, hidden, cells_of, len(chosen[0]), cells)
                self._marks.mark("expert", layer.index, uses[0].expert)
                self.transfer.release([use.slot for use in uses])
            for kept in step.kept:
                self._keep(layer.index, kept)
        self._begin_early(layer.index + 1, early, halves=2)  # one has just become free
        if self._ahead.weighs:
            needed = counts.needed_loads - needed_before
            self._ahead.weigh(needed, self._started, self.transfer.busy_seconds)
        if self._recorder is not None:
            scores = top_k_weights.tolist()  # sync: only while a trace is recorded
            self._recorder.note(layer.index, prompt, chosen, scores, layer.num_experts, guesses)
        weighted = cells.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)  # [T, k, H]
        return weighted.sum(dim=1).to(hidden.dtype)

    def _start_over(self) -> None:
        """After a step that broke off nothing that the table says can be believed."""
        self.transfer.drain()
        for ticket, layer in self._tickets.values():
            if layer is not None:
                self._kept[layer] -= not ticket.done
        self._tickets.clear()
        self._cold.clear()
        self._ahead.start_over()
        self._staging.start_over()
        self.cache.forget()
        for counts, kept in zip(self.cache.statistics.layers, self._kept, strict=True):
            counts.dropped += counts.loads - kept  # planned, and not begun or not finished
        if self._recorder is not None:
            self._recorder.started_over()

    def _surely_next(self, layer: Layer, chosen: int) -> list[int]:
        """Experts of the layer after `layer`, whose prompt chose so many, to be begun by now."""
        at = layer.index + 1
        if self._cold or at == len(self.layers) or not nearly_all(chosen, layer.num_experts):
            return []
        return absent(self.cache, at, self.layers[at].num_experts)

    def _begin_early(self, layer: int, experts: Sequence[int], halves: int) -> None:
        """Fill the halves of the rows that are free with the first of `experts`."""
        if not experts:
            return
        for use in self._staging.early(layer, experts, halves):
            self._start(layer, use, urgent=True)
            self.cache.statistics.layers[layer].early_loads += 1

    def _keep(self, layer: int, kept: Kept) -> None:
        """Copy what came early on into the slot it has by now."""
        self._give_up(kept.slot)
        ticket = self.transfer.keep(layer, kept.expert, kept.row, kept.slot)
        if ticket is not None:
            self._tickets[kept.slot] = ticket, None

    def _give_up(self, slot: int) -> None:
        """Whatever is on its way into `slot`, nobody waits for it any more."""
        ticket, layer = self._tickets.pop(slot, (None, None))
        if ticket is None or ticket.done or not self.transfer.drop(ticket):
            return
        if layer is not None:
            self.cache.statistics.layers[layer].dropped += 1  # nobody had asked for it
            self._kept[layer] -= 1
            self._ahead.dropped(ticket)

    def _start(self, layer: int, use: Use, *, urgent: bool) -> Ticket:
        self._give_up(use.slot)
        self._started += 1
        self._kept[layer] += 1
        ticket = self.transfer.start(layer, use.expert, use.slot, urgent=urgent)
        self._tickets[use.slot] = ticket, layer
        return ticket

    def _turns(self, step: Step) -> list[tuple[Use, ...]]:
        """The experts of a step in the order in which they are computed, some of them together."""
        uses = (*step.hits, *step.loads)
        if not self._compute.together:
            return [(use,) for use in uses]
        if step.beside:  # together
            return [uses]
        late = [use for use in uses if not self._is_here(use)]
        here = tuple(use for use in uses if use not in late)
        return [*([here] if here else []), *((use,) for use in late)]

    def _is_here(self, use: Use) -> bool:
        copy = self._tickets.get(use.slot)
        return copy is None or copy[0].done

    def _wait(self, layer: int, use: Use) -> None:
        """Return when what is in an expert's slot can be computed with."""
        copy = self._tickets.get(use.slot)
        if copy is not None:
            begin = time.perf_counter()
            self.transfer.wait(copy[0])
            self.cache.statistics.layers[layer].wait_seconds += time.perf_counter() - begin
            del self._tickets[use.slot]

    def warm(self, hot: Iterable[tuple[int, int, float]]) -> None:
        """Load what was hot in an earlier run, hottest first, whenever nobody waits for another.

        `hot`: layer, expert, decayed uses, which count on: a short run does not forget a long one.
        """
        with self._lock:
            for layer, expert, uses in hot:
                self.cache.heat.restore(layer, expert, uses)
                self._cold.append((layer, expert))
            self._warm_some()

    def _warm_some(self) -> None:
        """Begin as many of them as cannot delay an urgent copy."""
        most = len(self._cold) if self.transfer.overtakes else WARM_AT_ONCE
        while self._cold and most and self.cache.table.has_free():
            key = self._cold.popleft()
            use = self.cache.warm(*key)
            if use is None:
                continue
            most -= 1
            self._start(key[0], use, urgent=False)
            if self._recorder is not None:
                self._recorder.warmed(key)
        if not self.cache.table.has_free():
            self._cold.clear()

    @torch.inference_mode(False)  # what takes the old ones' place is written outside of it, too
    def give_back(self, shortage: int) -> None:
        """An allocation of `shortage` bytes failed on the device: have fewer slots from now on.

        What they held is forgotten. Raises `GenerationError` when there is but one slot
        (on each card).
        """
        with self._lock:
            before = slots = self.cache.table.slots
            least = self.cache.least_slots
            self._start_over()
            self._broken_off = False
            self._compute.close()  # its views of the slots
            while True:
                if slots == least:
                    left = "one expert slot left" + " on each card" * (least > 1)
                    raise GenerationError(
                        f"out of GPU memory with {left}: {NO_MEMORY}, or raise --vram"
                    )
                slots = max(least, fewer_slots(slots, shortage, self._info.slot_bytes))
                try:
                    self.transfer.resize(slots, self._staging.rows)
                    break
                except torch.OutOfMemoryError:  # somebody else took it meanwhile
                    shortage = 0
            self.cache.resize(slots)
            self._staging = staging_of(self.cache, self._staging.rows)
        logger.warning(
            "out of GPU memory: %d of %d expert slots (%s) are given back, and it goes on",
            before - slots,
            before,
            gib((before - slots) * self._info.slot_bytes),
        )

    def record(self, recorder: Recorder, noted_layers: int = 0) -> None:
        """Write down every call from now on, beginning with empty slots, so that a replay is exact.

        `noted_layers`: routers of so many later layers are asked too, whether or not that is acted
        on.
        """
        with self._lock:
            self.stop_recording()
            self._start_over()
            self._recorder = recorder
            self._ahead.noted_layers = noted_layers

    def stop_recording(self) -> None:
        """The trace is complete."""
        recorder, self._recorder = self._recorder, None
        self._ahead.noted_layers = 0
        if recorder is not None:
            recorder.close()

    def record_bytes(self, layer: int) -> int:
        return self._info.layout_of(layer).record_bytes

    def stats(self) -> Stats:
        """The figures of everything so far; subtract two to get what happened between them."""
        counts = self._cache.statistics
        sizes = [self.record_bytes(layer) for layer in range(len(counts.layers))]
        loaded = (n.loads * size for n, size in zip(counts.layers, sizes, strict=True))
        in_place = 0
        if self.transfer.streams_in_place:
            beside = (layer.loads_beside for layer in counts.layers)
            in_place = sum(n * size for n, size in zip(beside, sizes, strict=True))
        return Stats(
            counts=counts.total(),
            layers=tuple(replace(layer) for layer in counts.layers),
            slots=self._cache.table.slots,
            total_experts=self._info.total_experts,
            bytes_loaded=sum(loaded),
            link_busy_seconds=self.transfer.busy_seconds,
            tokens=self.tokens,
            bytes_in_place=in_place,
        )

    def close(self) -> None:
        """Free the slots and end the copies; the model cannot be used afterwards."""
        if self.closed:
            return
        self.closed = True
        self.stop_recording()
        for hook in self._hooks:
            hook.remove()
        self._compute.close()
        self._tickets.clear()
        self.transfer.close()


def fewer_slots(slots: int, shortage: int, slot_bytes: int) -> int:
    """How many of `slots` remain so that `shortage` bytes and some more become free."""
    wanted = -(-(shortage + max(shortage // 4, SLACK)) // slot_bytes) if shortage else 0
    return max(1, slots - max(wanted, -(-slots // 10)))


def _cells_by_expert(chosen: list[list[int]], num_experts: int) -> dict[int, list[int]]:
    """Expert -> its cells (token * k + place); an index past the experts is a sentinel.

    Experts are in the order of their last cell: what the last tokens chose is loaded last.
    """
    cells: dict[int, list[int]] = {}
    cell = 0
    for places in chosen:
        for expert in places:
            if 0 <= expert < num_experts:
                cells.setdefault(expert, []).append(cell)
            cell += 1
    if len(chosen) > 1:  # as `cache.trace.by_last_appearance`
        return dict(sorted(cells.items(), key=lambda item: item[1][-1]))
    return cells


def _admit(last: list[int], cells_of: dict[int, list[int]]) -> int:
    """How many experts the last token of a prompt chose (as `cache.trace.Event.admit`)."""
    return len({expert for expert in last if expert in cells_of})
