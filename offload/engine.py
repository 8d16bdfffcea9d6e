"""The host-planned engine: the plan of every MoE layer is made in Python.

One sync a layer, two where it looks ahead.

Knows: the order of things in a step: plan, start copies, compute what is here, wait, compute the
rest, reduce once. Does not know: who is evicted (`cache`), how bytes move (`offload.transfer`),
what they mean (`quant`).

Letters: T tokens, k experts a token, S = T * k cells, H hidden, I inner, E experts.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cache.cache import ExpertCache
from cache.lookahead import LookaheadBalance
from cache.plan import Use
from cache.policy import Key
from cache.predictors import NO_LOOKAHEAD, WITH_ROUTER, Lookahead, make_predictor, merged
from cache.trace import Guess
from offload.errors import GenerationError
from offload.marks import NO_MARKS, Marks
from offload.norms import NormFinder, scale_between
from offload.recording import Recorder
from offload.stats import Stats
from offload.transfer import Ticket, Transfer
from quant.matmul import matmul
from quant.pack import PackInfo
from quant.record import MatrixView, view_record

WARM_AT_ONCE = 4  # copies a step, where an urgent one cannot overtake them


class Layer:
    """One MoE layer's experts, called by transformers in place of its own."""

    def __init__(self, engine: Engine, index: int, module: nn.Module, num_experts: int) -> None:
        self.engine = engine
        self.index = index
        self.module = module
        self.num_experts = num_experts
        self.router: nn.Module | None = None  # of this layer
        self.asked: Tensor | None = None  # what this layer's router was just asked about
        self.constants: tuple[Any, ...] | None = None  # its other arguments; None: not called yet
        self.finder: NormFinder | None = None  # of the norm that feeds the router
        self.scales: dict[int, Tensor | None] = {}  # later layer -> what its norm makes of ours

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.engine.step(self, hidden, top_k_index, top_k_weights)

    def guess(self, hidden: Tensor) -> list[int]:
        """The experts this layer's router would choose for `hidden` [.., H] of one token."""
        if self.router is None or self.constants is None:
            return []
        answer = self.router.forward(hidden, *self.constants)  # without hooks: nobody else asked
        index = answer[2] if isinstance(answer, tuple) and len(answer) > 2 else None
        if not isinstance(index, Tensor) or index.is_floating_point():
            self.router = None  # not a router as transformers writes them
            return []
        chosen = index.flatten().tolist()  # sync: the plan is made on the host
        return [expert for expert in chosen if 0 <= expert < self.num_experts]

    def remember(self, owned: Set[int], _: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what the router is asked; `owned` are the ids of the model's parameters and buffers.

        With many tokens nearly every expert is chosen: guessing is no help, nothing is kept.
        """
        self.constants = args[1:]
        if any(rest is not None and id(rest) not in owned for rest in self.constants):
            self.router = None  # it looks at more than the hidden state
        if self.finder is not None and self.finder.norm is None and args:
            self.finder.asked(args[0])
        one_token = bool(args) and args[0].numel() == args[0].shape[-1]
        self.asked = args[0] if one_token else None

    def as_seen_by(self, later: Layer, hidden: Tensor) -> Tensor:
        """What `later`'s norm would make of the state that ours made `hidden` of."""
        if later.index not in self.scales:
            mine, theirs = (at.finder.norm if at.finder else None for at in (self, later))
            self.scales[later.index] = scale_between(mine, theirs, hidden)
        scale = self.scales[later.index]
        return hidden if scale is None else hidden * scale

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


def _around(model: nn.Module, experts: nn.Module) -> nn.Module:
    """The decoder layer that `experts` is part of."""
    path = next(name for name, module in model.named_modules() if module is experts)
    parts = path.split(".")
    deep = max((at for at, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return model.get_submodule(".".join(parts[: deep + 1]))


class Engine:
    """Serves the experts of a whole model from a cache of slots."""

    def __init__(
        self,
        info: PackInfo,
        cache: ExpertCache,
        transfer: Transfer,
        balance: LookaheadBalance | None,
        lookahead: Lookahead = NO_LOOKAHEAD,
    ) -> None:
        """With `balance` looking ahead stops while it does not pay; with None it never does."""
        self._info = info
        self.cache = cache
        self.transfer = transfer
        self._balance = balance
        self.layers: list[Layer] = []
        self._lookahead = lookahead
        self._predictor = make_predictor(lookahead.predictor, len(info.layers))
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # slot -> unawaited copy, its layer
        self._guessed: deque[Ticket] = deque()  # copies of guesses that may not have landed
        self._cold: deque[Key] = deque()  # hot experts of the run before, not begun to load
        self._recorder: Recorder | None = None
        self._noted_layers = 0  # guesses for so many later layers are written down
        self.prompt: bool | None = None  # whether prefill is running; None: not known
        self._views: dict[tuple[int, int], dict[str, MatrixView]] = {}  # (layout, slot)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._started = 0  # copies
        self._lock = threading.RLock()  # a step at a time, whoever calls the model
        self._broken_off = False  # the step before did not come to its end
        self.tokens = 0  # that went through the first layer
        self.closed = False
        self._marks: Marks = NO_MARKS

    def tell(self, marks: Marks) -> None:
        """Tell `marks` when steps and copies happen."""
        self._marks = self.transfer.marks = marks

    def add_layer(self, module: nn.Module) -> Layer:
        """The next MoE layer of the model."""
        index = len(self.layers)
        layer = Layer(self, index, module, self._info.layers[index].num_experts)
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

    def watch_routers(self, model: nn.Module, routers: Sequence[nn.Module | None]) -> None:
        """Look ahead with these routers, one for each layer; None where there is none to ask."""
        owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for layer, router in zip(self.layers, routers, strict=True):
            layer.router = router
            if router is not None:
                layer.finder = NormFinder(_around(model, layer.module))
                hook = functools.partial(layer.remember, owned)
                self._hooks.append(router.register_forward_pre_hook(hook))

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
        needed_before = self.cache.statistics.layers[layer.index].needed_loads
        plan = self.cache.plan(layer.index, list(cells_of), prompt=prompt)
        guesses: list[Guess] = []
        cells: Tensor | None = None  # [S, H]
        for wave in plan.waves:
            for use in wave.loads:
                self._start(layer.index, use, urgent=True)
            if wave is plan.waves[-1]:
                guesses = self._look_ahead(layer, cells_of if len(chosen) == 1 else None)
            self._marks.mark("plan", layer.index)
            for use in (*wave.hits, *wave.loads):
                matrices = self._ready(layer.index, use)
                self._marks.mark("wait", layer.index)
                where = cells_of[use.expert]
                out = layer.expert(_rows(hidden, where, len(chosen[0])), matrices)
                if cells is None:
                    cells = out.new_zeros(top_k_index.numel(), out.shape[-1])
                _put(cells, where, out)
                self._marks.mark("expert", layer.index, use.expert)
                self.transfer.release(use.slot)
        self._weigh(layer.index, needed_before)
        if self._recorder is not None:
            scores = top_k_weights.tolist()  # sync: only while a trace is recorded
            self._recorder.note(layer.index, prompt, chosen, scores, layer.num_experts, guesses)
        if cells is None:  # every index was a sentinel
            return torch.zeros_like(hidden)
        weighted = cells.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)  # [T, k, H]
        return weighted.sum(dim=1).to(hidden.dtype)

    def _start_over(self) -> None:
        """After a step that broke off nothing that the table says can be believed."""
        self._lock = threading.RLock()  # Ctrl-C inside its release may have left the old one taken
        self.transfer.drain()
        self._tickets.clear()
        self._guessed.clear()
        self._cold.clear()
        self.cache.forget()
        if self._recorder is not None:
            self._recorder.started_over()

    def _start(self, layer: int, use: Use, *, urgent: bool) -> Ticket:
        before = self._tickets.pop(use.slot, None)
        if before is not None and not before[0].done and self.transfer.drop(before[0]):
            self.cache.statistics.layers[before[1]].dropped += 1  # nobody had asked for it
            if before[0] in self._guessed:
                self._guessed.remove(before[0])
        self._started += 1
        ticket = self.transfer.start(layer, use.expert, use.slot, urgent=urgent)
        self._tickets[use.slot] = ticket, layer
        return ticket

    def _ready(self, layer: int, use: Use) -> dict[str, MatrixView]:
        """The matrices of an expert, once they have arrived."""
        copy = self._tickets.pop(use.slot, None)
        if copy is not None:
            begin = time.perf_counter()
            self.transfer.wait(copy[0])
            self.cache.statistics.layers[layer].wait_seconds += time.perf_counter() - begin
        key = (self._info.layers[layer].layout, use.slot)
        if key not in self._views:
            self._views[key] = view_record(self.transfer.slot(use.slot), self._info.layouts[key[0]])
        return self._views[key]

    def _look_ahead(self, layer: Layer, chosen: Iterable[int] | None) -> list[Guess]:
        """Guess what the next layers will want and load it; `chosen`: what the one token wants."""
        hidden, layer.asked = layer.asked, None
        if chosen is None:  # of many tokens' experts nearly all are wanted: no need to guess
            return []
        wanted = list(chosen)
        if self._predictor is not None:
            self._predictor.observe(layer.index, wanted)
        ahead = min(self._lookahead.layers, len(self.layers) - 1 - layer.index)
        if ahead < 1 or (self._balance is not None and not self._balance.worthwhile):
            return self._note_guesses(layer, hidden, 0)
        if self._link_is_behind(ahead * len(wanted)):
            return self._note_guesses(layer, hidden, 0)
        begin = time.perf_counter()
        guesses = []
        for later in self.layers[layer.index + 1 : layer.index + 1 + ahead]:
            experts = self._guess(layer, later, hidden)
            if not experts:
                continue
            guesses.append(Guess(later.index, tuple(experts)))
            for use in self.cache.look_ahead(later.index, experts, most=len(experts)):
                self._guessed.append(self._start(later.index, use, urgent=False))
        if self._balance is not None:
            self._balance.guessed(time.perf_counter() - begin)
        return guesses + self._note_guesses(layer, hidden, ahead)

    def _weigh(self, layer: int, needed_before: int) -> None:
        """Tell the balance what this step needed, where there is anything to weigh."""
        if self._balance is None or not self._lookahead.layers:
            return
        needed = self.cache.statistics.layers[layer].needed_loads - needed_before
        self._balance.step(needed, self._started, self.transfer.busy_seconds)

    def _guess(self, layer: Layer, later: Layer, hidden: Tensor | None) -> list[int]:
        """Experts of `later`, likeliest first, now that `layer` was asked about `hidden`."""
        experts: list[int] = []
        if hidden is not None and self._lookahead.predictor in WITH_ROUTER:
            experts = later.guess(layer.as_seen_by(later, hidden))
        if self._predictor is not None:
            said = self._predictor.guess(layer.index, later.index - layer.index)
            experts = merged(experts, said)
        return experts

    def _link_is_behind(self, most: int) -> bool:
        """Whether `most` or more guessed experts still wait to be copied."""
        while self._guessed and self._guessed[0].done:
            self._guessed.popleft()
        return len(self._guessed) >= most

    def _note_guesses(self, layer: Layer, hidden: Tensor | None, ahead: int) -> list[Guess]:
        """For a trace: what routers past `ahead` layers would say."""
        if hidden is None or self._noted_layers <= ahead:
            return []
        later = self.layers[layer.index + 1 + ahead : layer.index + 1 + self._noted_layers]
        said = ((at.index, at.guess(layer.as_seen_by(at, hidden))) for at in later)
        return [Guess(index, tuple(experts), live=False) for index, experts in said]

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

    def record(self, recorder: Recorder, noted_layers: int = 0) -> None:
        """Write down every call from now on, beginning with empty slots, so that a replay is exact.

        `noted_layers`: routers of so many later layers are asked too, whether or not that is acted
        on.
        """
        with self._lock:
            self.stop_recording()
            self._start_over()
            self._predictor = make_predictor(self._lookahead.predictor, len(self.layers))
            self._recorder = recorder
            self._noted_layers = noted_layers

    def stop_recording(self) -> None:
        """The trace is complete."""
        recorder, self._recorder, self._noted_layers = self._recorder, None, 0
        if recorder is not None:
            recorder.close()

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
        self.stop_recording()
        for hook in self._hooks:
            hook.remove()
        self._views.clear()
        self._tickets.clear()
        self.transfer.close()


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
