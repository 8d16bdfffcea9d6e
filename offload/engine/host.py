"""The host-planned half of the engine: Python decides every layer's step and starts its copies."""

# T tokens, k experts a token, S = T * k cells, H hidden

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from offload.cache.decision import Use
from offload.cache.guesses import LookaheadBalance
from offload.cache.policies import Key
from offload.cache.sharded import Cache
from offload.cache.staging import Step, absent, nearly_all, staging_of
from offload.cache.trace.trace import Guess
from offload.engine.ahead import Ahead
from offload.engine.compute import Compute
from offload.engine.history import RoutingTrace
from offload.engine.layer import Call, Layer
from offload.engine.stats import Stats
from offload.quant.pack import PackInfo
from offload.ranges import recorded, work
from offload.transfer.base import Ticket, Transfer

WARM_AT_ONCE = 4  # warm copies begun per step on a link where an urgent copy cannot overtake them


class Watcher(Protocol):
    """An object that the host-planned engine tells what it did."""

    def served(self, call: Call, guesses: Sequence[Guess], copies: int) -> None:
        """`call` is served; `guesses` were made meanwhile, and `copies` were begun so far."""

    def warmed(self, key: Key) -> None:
        """A warm start began to load `key`."""

    def started_over(self) -> None:
        """The slots were emptied."""


class HostPlanned:
    """Serves calls of any size, with one wait for the device per layer, two with look-ahead."""

    def __init__(
        self,
        info: PackInfo,
        layers: list[Layer],
        cache: Cache,
        transfer: Transfer,
        compute: Compute,
        balance: LookaheadBalance | None,
        lookahead: bool = False,
        staging: int = 0,
    ) -> None:
        """`layers` is filled later, and shared with whoever else plans.

        With `balance` look-ahead stops while it does not pay; with None it never stops.

        `staging` is the number of rows that `transfer` has past the slots, for prompts. Without
        such rows a prompt is served in waves.
        """
        self.info, self.cache, self.transfer = info, cache, transfer
        self.layers = layers
        self.tokens = 0  # how many went through the first layer
        self._compute = compute
        self._staging = staging_of(cache, staging)  # of each layer
        self._ahead = Ahead(layers, cache, transfer, lookahead, balance)
        self._trace: RoutingTrace | None = None
        self._watchers: list[Watcher] = [self._ahead]
        # slot -> (copy that nobody has waited for, layer to charge its wait to). The layer is None
        # if the load was already counted while the record sat in a staging row.
        self._tickets: dict[int, tuple[Ticket, int | None]] = {}
        self._cold: deque[Key] = deque()  # hot experts of the run before that are not loaded yet
        self._started = 0  # copies
        self._kept = [0] * len(info.layers)  # copies of each layer begun and not given up

    @property
    def must_plan(self) -> bool:
        """Whether calls have to come here: a routing trace or a timeline is recorded, or a warm
        start goes on."""
        return self._trace is not None or recorded() or bool(self._cold)

    def serve(self, call: Call) -> Tensor:
        """The experts' part [T, H] of one layer."""
        self._warm_some()
        decide, compute = self._parts()
        steps = decide(call)
        early = self._surely_next(call)
        cells = call.hidden.new_zeros(call.index.numel(), call.hidden.shape[-1])  # [S, H]
        guesses: list[Guess] = []
        for step in steps:
            for use in step.begin:
                self._start(call.layer.index, use, urgent=True)
            if step is steps[-1]:
                guesses = self._look_ahead(call)
                self._begin_early(call, early, halves=1 if step.beside else 2)
            for uses in self._turns(call, step):
                self._wait(call, uses)
                compute(call, uses, cells)
                self.transfer.release([use.slot for use in uses])
            self._keep(call, step)
        self._begin_early(call, early, halves=2)  # the last step released its half of the rows
        self._tell(call, guesses)
        return self._compute.reduced(call, cells)

    def _parts(self) -> tuple[Callable[[Call], list[Step]], Callable[..., None]]:
        """The parts that decide and compute, each a range of the timeline if one is recorded."""
        if not recorded():
            return self._decide, self._compute.run
        return _in_range("decision", self._decide), _in_range("experts", self._compute.run)

    def _decide(self, call: Call) -> list[Step]:
        """Ask the cache which expert is loaded where, and divide the answer into steps."""
        at = call.layer.index
        if at == 0:
            self.tokens += len(call.hidden)
        admit = call.of_last_token if self._streams(call) else None
        decision = self.cache.decide(at, list(call.cells_of), prompt=call.prompt, admit=admit)
        steps = self._staging[at].steps(decision)
        # Each load is in one step. Loads that were not begun early are in the `begin` of one.
        right = sum(len(step.loads) - len(step.begin) for step in steps)
        self.cache.statistics.layers[at].early_loads_right += right
        return steps

    def _streams(self, call: Call) -> bool:
        """Whether experts that get no slot pass through rows past the slots."""
        return call.prompt and self._staging[call.layer.index].rows > 0

    def _surely_next(self, call: Call) -> list[int]:
        """Experts of the next layer that this prompt will want almost surely."""
        at = call.layer.index + 1
        if (
            not self._streams(call)
            or self._cold
            or at == len(self.layers)
            or not nearly_all(len(call.cells_of), call.layer.num_experts)
        ):
            return []
        return absent(self.cache, at, self.layers[at].num_experts)

    def _begin_early(self, call: Call, experts: Sequence[int], halves: int) -> None:
        """Fill the free halves of the staging rows with the first of the next layer's `experts`."""
        if not experts:
            return
        layer = call.layer.index + 1
        for use in self._staging[layer].early(layer, experts, halves):
            self._start(layer, use, urgent=True)
            self.cache.statistics.layers[layer].early_loads += 1

    def _look_ahead(self, call: Call) -> list[Guess]:
        """Begin the copies that later layers will probably want."""
        guesses, wanted = self._ahead.look(call)
        self._ahead.begun(
            [(later, self._start(later.index, use, urgent=False)) for later, use in wanted]
        )
        return guesses

    def _start(self, layer: int, use: Use, *, urgent: bool) -> Ticket:
        self._give_up(use.slot)
        self._started += 1
        self._kept[layer] += 1
        ticket = self.transfer.start(layer, use.expert, use.slot, urgent=urgent)
        self._tickets[use.slot] = ticket, layer
        return ticket

    def _give_up(self, slot: int) -> None:
        """Give up the copy that may be on its way into `slot`: nobody waits for it any more."""
        ticket, layer = self._tickets.pop(slot, (None, None))
        if ticket is None or ticket.done or not self.transfer.drop(ticket):
            return
        if layer is not None:
            self.cache.statistics.layers[layer].dropped += 1  # a guess, or a wrong early load
            self._kept[layer] -= 1
            self._ahead.dropped(ticket)

    def _turns(self, call: Call, step: Step) -> list[tuple[Use, ...]]:
        """The experts of a step in the order in which they are computed, some of them together."""
        uses = (*step.hits, *step.loads)
        if not self._compute.together(call):
            return [(use,) for use in uses]
        if step.beside:  # together
            return [uses]
        late = dict.fromkeys(use for use in uses if not self._is_here(use))
        here = tuple(use for use in uses if use not in late)
        return [*([here] if here else []), *((use,) for use in late)]

    def _is_here(self, use: Use) -> bool:
        copy = self._tickets.get(use.slot)
        return copy is None or copy[0].done

    def _wait(self, call: Call, uses: Sequence[Use]) -> None:
        """Return when the slots of `uses` can be computed from."""
        for use in uses:
            copy = self._tickets.get(use.slot)
            if copy is not None:
                begin = time.perf_counter()
                with work("wait", call.layer.index, use.expert):
                    self.transfer.wait(copy[0])
                counts = self.cache.statistics.layers[call.layer.index]
                counts.wait_seconds += time.perf_counter() - begin
                del self._tickets[use.slot]

    def _keep(self, call: Call, step: Step) -> None:
        """Copy the experts that came early from their rows into the slots they have by now."""
        for kept in step.kept:
            self._give_up(kept.slot)
            ticket = self.transfer.keep(call.layer.index, kept.expert, kept.row, kept.slot)
            if ticket is not None:
                self._tickets[kept.slot] = ticket, None

    def _tell(self, call: Call, guesses: Sequence[Guess]) -> None:
        for watcher in self._watchers:
            watcher.served(call, guesses, self._started)

    def warm(self, hot: Iterable[tuple[int, int, float]]) -> None:
        """Load what was hot in an earlier run, hottest first, whenever nobody waits for a copy.

        `hot` has layer, expert and decayed uses. The uses count on from there, so that a short run
        does not forget a long one.
        """
        for layer, expert, uses in hot:
            self.cache.heat.restore(layer, expert, uses)
            self._cold.append((layer, expert))
        self._warm_some()

    def warm_again(self) -> None:
        """After the slots were emptied, load the experts that are hottest by now."""
        self._cold.extend(self.cache.heat.hottest(self.cache.table.slots))

    def _warm_some(self) -> None:
        """Begin as many warm copies as cannot delay an urgent copy."""
        most = len(self._cold) if self.transfer.overtakes else WARM_AT_ONCE
        while self._cold and most and self.cache.table.has_free():
            key = self._cold.popleft()
            use = self.cache.warm(*key)
            if use is None:
                continue
            most -= 1
            self._start(key[0], use, urgent=False)
            for watcher in self._watchers:
                watcher.warmed(key)
        if self._cold and not self.cache.table.has_free():
            self._cold.clear()

    def settle(self) -> None:
        """Return when every copy that was begun is complete. Raises what a copy raised."""
        for ticket, _ in self._tickets.values():
            self.transfer.wait(ticket)
        self._tickets.clear()

    def start_over(self) -> None:
        """Empty the slots: after a call that broke off, the cache's table cannot be believed."""
        self.transfer.drain()
        for ticket, layer in self._tickets.values():
            if layer is not None:
                self._kept[layer] -= not ticket.done
        self._tickets.clear()
        self._cold.clear()
        for staging in self._staging:
            staging.start_over()
        self.cache.forget()
        for counts, kept in zip(self.cache.statistics.layers, self._kept, strict=True):
            counts.dropped += counts.loads - kept  # loads never begun or never finished
        for watcher in self._watchers:
            watcher.started_over()

    def count_elsewhere(self, tokens: int, loads: Sequence[int]) -> None:
        """Another planner served `tokens` and loaded so many experts of each layer."""
        self.tokens += tokens
        self._kept = [mine + theirs for mine, theirs in zip(self._kept, loads, strict=True)]

    def resize(self, slots: int) -> None:
        """Have memory for `slots` from now on. Raises `torch.OutOfMemoryError`; then call again
        with fewer."""
        self._compute.close()  # it has views of the old slots
        rows = self._staging[0].rows
        self.cache.resize(slots)  # first, so that Ctrl-C leaves it no slot without memory
        self._staging = staging_of(self.cache, rows)
        self.transfer.resize(slots, rows)

    def record(self, trace: RoutingTrace, noted_layers: int) -> None:
        """Write every call to `trace` from now on; `noted_layers` as in `Engine.record`."""
        self._ahead.noted_layers = noted_layers
        self._trace = trace
        self._watchers.append(trace)

    def stop_recording(self) -> None:
        """Complete the routing trace, if one is being written."""
        trace, self._trace = self._trace, None
        self._ahead.noted_layers = 0
        if trace is not None:
            self._watchers.remove(trace)
            trace.close()

    def stats(self) -> Stats:
        """The figures of everything so far."""
        counts = self.cache.statistics
        sizes = [self.info.layout_of(layer).record_bytes for layer in range(len(counts.layers))]
        loaded = sum(n.loads * size for n, size in zip(counts.layers, sizes, strict=True))
        beside = sum(n.loads_beside * size for n, size in zip(counts.layers, sizes, strict=True))
        in_place = loaded if self.transfer.in_place else beside * self.transfer.streams_in_place
        return Stats(
            counts=counts.total(),
            layers=tuple(replace(layer) for layer in counts.layers),
            slots=self.cache.table.slots,
            total_experts=self.info.total_experts,
            bytes_loaded=loaded,
            link_busy_seconds=self.transfer.busy_seconds,
            tokens=self.tokens,
            bytes_in_place=in_place,
        )

    def close(self) -> None:
        """Free the slots and end the copies."""
        self.stop_recording()
        self._compute.close()
        self._tickets.clear()
        self.transfer.close()


def _in_range(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(call: Call, uses: Sequence[Use] = (), *rest: Tensor) -> Any:
        with work(name, call.layer.index, *[use.expert for use in uses]):
            return part(call, uses, *rest) if uses else part(call)

    return ranged
