"""Look-ahead: guesses what the next layer will want; each guess costs a wait for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.cache.decision import Use
from offload.cache.guesses import LookaheadBalance
from offload.cache.policies import Key
from offload.cache.sharded import Cache
from offload.cache.trace.trace import Guess
from offload.engine.layer import Call, Layer
from offload.transfer.base import Ticket, Transfer


class Ahead:
    """Guesses for the layer that follows the one at work, while that pays.

    It watches the engine (`engine.host.Watcher`), to tell the balance what waiting costs.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        cache: Cache,
        transfer: Transfer,
        lookahead: bool,
        balance: LookaheadBalance | None,
    ) -> None:
        """Without `lookahead` nothing is guessed. With `balance` look-ahead stops while it does not
        pay; with None it never stops."""
        self._layers, self._cache, self._transfer = layers, cache, transfer
        self._lookahead = lookahead
        self._balance = balance if lookahead else None
        self._needed = [0] * len(cache.statistics.layers)  # useful loads before a layer's call
        # Copies of guesses that may not have landed, by device, since each device has its own link.
        self._guessed: dict[torch.device | None, deque[Ticket]] = defaultdict(deque)
        self._since: float | None = None  # when guessing began for the layer at work
        self.noted_layers = 0  # how many later layers' routers are asked for a routing trace

    def dropped(self, copy: Ticket) -> None:
        """Note that `copy`, which may belong to a guess, will never land."""
        for copies in self._guessed.values():
            if copy in copies:
                copies.remove(copy)

    def look(self, call: Call) -> tuple[list[Guess], list[tuple[Layer, Use]]]:
        """What was guessed for the next layer, and the copies to begin for it.

        Report the copies by `begun`. A call of many tokens gets no guess, since nearly all
        experts of the next layer will be wanted.
        """
        layer = call.layer
        hidden, layer.asked = layer.asked, None
        if len(call.hidden) > 1 or hidden is None:
            return [], []
        later = self._next(layer, len(call.cells_of))
        noted = self._note_guesses(layer, hidden, later)
        if later is None:
            return noted, []
        self._since = time.perf_counter()
        experts = later.guess(layer.as_seen_by(later, hidden))
        if not experts:
            return noted, []
        loads = self._cache.look_ahead(later.index, experts, most=len(experts))
        guess = Guess(later.index, tuple(experts))
        return [guess, *noted], [(later, use) for use in loads]

    def _next(self, layer: Layer, wanted: int) -> Layer | None:
        """The layer to guess for, which will choose `wanted` experts; None for no guess now."""
        worthwhile = self._balance is None or self._balance.worthwhile
        if not self._lookahead or not worthwhile or layer.index + 1 == len(self._layers):
            return None
        later = self._layers[layer.index + 1]
        return None if self._link_is_behind(later, wanted) else later

    def _link_is_behind(self, later: Layer, most: int) -> bool:
        """Whether the link to the device of `later` still has `most` guesses to copy, or more."""
        copies = self._guessed[later.device]
        while copies and copies[0].done:
            copies.popleft()
        return len(copies) >= most

    def begun(self, copies: Sequence[tuple[Layer, Ticket]]) -> None:
        """The copies that the last `look` wanted were begun, so this guess is complete."""
        for later, copy in copies:
            self._guessed[later.device].append(copy)
        if self._since is not None and self._balance is not None:
            self._balance.guessed(time.perf_counter() - self._since)
        self._since = None

    def _note_guesses(self, layer: Layer, hidden: Tensor, guessed: Layer | None) -> list[Guess]:
        """For a routing trace: what the routers of later layers but `guessed` would say."""
        later = self._layers[layer.index + 1 : layer.index + 1 + self.noted_layers]
        said = ((at.index, at.guess(layer.as_seen_by(at, hidden))) for at in later if at != guessed)
        return [Guess(index, tuple(experts), live=False) for index, experts in said]

    def served(self, call: Call, guesses: Sequence[Guess], copies: int) -> None:
        """Tell the balance how many loads this call needed, and what a copy takes."""
        if self._balance is not None:
            at = call.layer.index
            before = self._needed[at]
            self._needed[at] = self._cache.statistics.layers[at].useful_loads
            self._balance.step(self._needed[at] - before, copies, self._transfer.busy_seconds)

    def warmed(self, key: Key) -> None:
        """Ignore a warm load, since nobody waited for it."""

    def started_over(self) -> None:
        """No copy is under way, and what a call that broke off needed is not weighed."""
        self._guessed.clear()
        self._since = None
        self._needed = [counts.useful_loads for counts in self._cache.statistics.layers]
