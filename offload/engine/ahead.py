"""Look-ahead: guesses what later layers will want, one more wait for the device per layer."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.cache.decision import Use
from offload.cache.guesses import WITH_ROUTER, Lookahead, LookaheadBalance, make_predictor, merged
from offload.cache.interface import Cache
from offload.cache.policy import Key
from offload.cache.statistics import Statistics
from offload.cache.trace.trace import Guess
from offload.engine.layer import Call, Layer
from offload.transfer.base import Ticket, Transfer


class Ahead:
    """Guesses for the layers that follow the one at work."""

    def __init__(
        self,
        layers: Sequence[Layer],
        cache: Cache,
        lookahead: Lookahead,
        balance: LookaheadBalance | None,
    ) -> None:
        """With `balance` look-ahead stops while it does not pay; with None it never stops."""
        self._layers = layers
        self._cache = cache
        self._lookahead = lookahead
        self._balance = balance
        # Copies of guesses that may not have landed, for each device: each has a link of its own.
        self._guessed: dict[torch.device | None, deque[Ticket]] = defaultdict(deque)
        self._since: float | None = None  # when guessing began for the layer at work
        self.noted_layers = 0  # routers of so many later layers are asked for a routing trace
        self.forget()

    def start_over(self) -> None:
        """No copy is under way."""
        self._guessed.clear()

    def forget(self) -> None:
        """Nothing is known of what was asked for, as at the beginning."""
        layers = len(self._cache.statistics.layers)
        self._predictor = make_predictor(self._lookahead.predictor, layers)

    def dropped(self, copy: Ticket) -> None:
        """`copy`, which may be that of a guess, will never land."""
        for copies in self._guessed.values():
            if copy in copies:
                copies.remove(copy)

    def look(self, call: Call) -> tuple[list[Guess], list[tuple[Layer, Use]]]:
        """What was guessed for later layers, and the copies to begin for it.

        Report the copies by `begun`, then call `end`. Of a call of many tokens nothing is guessed,
        since nearly all experts of the next layer will be wanted.
        """
        layer = call.layer
        hidden, layer.asked = layer.asked, None
        if len(call.hidden) > 1:
            return [], []
        wanted = list(call.cells_of)
        if self._predictor is not None:
            self._predictor.observe(layer.index, wanted)
        near = self._layers[layer.index + 1 : layer.index + 1 + self._lookahead.layers]
        if self._balance is not None and not self._balance.worthwhile:
            near = ()
        near = [at for at in near if not self._link_is_behind(at, near, len(wanted))]
        noted = self._note_guesses(layer, hidden, near)
        if not near:
            return noted, []
        self._since = time.perf_counter()
        guesses: list[Guess] = []
        uses: list[tuple[Layer, Use]] = []
        for later in near:
            experts = self._guess(layer, later, hidden)
            if experts:
                guesses.append(Guess(later.index, tuple(experts)))
                loads = self._cache.look_ahead(later.index, experts, most=len(experts))
                uses += [(later, use) for use in loads]
        return guesses + noted, uses

    def begun(self, later: Layer, copy: Ticket) -> None:
        """`copy` of an expert of the layer `later` was begun."""
        self._guessed[later.device].append(copy)

    def end(self) -> None:
        """All copies were begun that the last `look` wanted: so long did guessing take."""
        if self._since is not None and self._balance is not None:
            self._balance.guessed(time.perf_counter() - self._since)
        self._since = None

    def _guess(self, layer: Layer, later: Layer, hidden: Tensor | None) -> list[int]:
        """Experts of `later`, likeliest first, now that `layer` was asked about `hidden`."""
        experts: list[int] = []
        if hidden is not None and self._lookahead.predictor in WITH_ROUTER:
            experts = later.guess(layer.as_seen_by(later, hidden))
        if self._predictor is not None:
            said = self._predictor.guess(layer.index, later.index - layer.index)
            experts = merged(experts, said)
        return experts

    def _link_is_behind(self, later: Layer, near: Sequence[Layer], each: int) -> bool:
        """Whether the link to the device of `later` still has as many guesses to copy as there
        would be now: `each` for every layer of `near` on that device."""
        copies = self._guessed[later.device]
        while copies and copies[0].done:
            copies.popleft()
        return len(copies) >= each * sum(at.device == later.device for at in near)

    def _note_guesses(
        self, layer: Layer, hidden: Tensor | None, guessed: Sequence[Layer]
    ) -> list[Guess]:
        """For a routing trace: what the routers of layers not `guessed` for would say."""
        if hidden is None or not self.noted_layers:
            return []
        later = self._layers[layer.index + 1 : layer.index + 1 + self.noted_layers]
        said = (
            (at.index, at.guess(layer.as_seen_by(at, hidden))) for at in later if at not in guessed
        )
        return [Guess(index, tuple(experts), live=False) for index, experts in said]


class Weigher:
    """Tells the balance after each call what waiting costs, so that it can weigh guessing."""

    def __init__(
        self, balance: LookaheadBalance, statistics: Statistics, transfer: Transfer
    ) -> None:
        self._balance, self._statistics, self._transfer = balance, statistics, transfer
        self._needed = [0] * len(statistics.layers)  # loads of use to each layer before its call

    def served(self, call: Call, guesses: Sequence[Guess], copies: int) -> None:
        """As `engine.host.Watcher` says."""
        at = call.layer.index
        before, self._needed[at] = self._needed[at], self._statistics.layers[at].useful_loads
        self._balance.step(self._needed[at] - before, copies, self._transfer.busy_seconds)

    def warmed(self, key: Key) -> None:
        """Nobody waited for a warm load."""

    def started_over(self) -> None:
        """What a call that broke off needed is not weighed."""
        self._needed = [counts.useful_loads for counts in self._statistics.layers]
