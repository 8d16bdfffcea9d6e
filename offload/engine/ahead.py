"""Looking ahead: what later layers will want is guessed, and its copies are begun.

Knows: who is asked for a guess, when guessing stands back, what a trace is told of it. Does not
know: which guess may load or evict (`cache`), how a copy is carried out (`offload.engine`).

One more sync a layer, where routers are asked.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from offload.cache.decision import Use
from offload.cache.guesses import WITH_ROUTER, Lookahead, LookaheadBalance, make_predictor, merged
from offload.cache.interface import Cache
from offload.cache.trace.trace import Guess
from offload.engine.layer import Layer
from offload.transfer.base import Ticket


class Ahead:
    """Guesses for the layers that follow the one at work."""

    def __init__(
        self,
        layers: Sequence[Layer],
        cache: Cache,
        lookahead: Lookahead,
        balance: LookaheadBalance | None,
        start: Callable[[int, Use], Ticket],
    ) -> None:
        """`start` begins the copy of a guessed expert of a layer. With `balance` looking ahead
        stops while it does not pay; with None it never does."""
        self._layers = layers
        self._cache = cache
        self._lookahead = lookahead
        self._balance = balance
        self._start = start
        # Copies of guesses that may not have landed, for each device: each has a link of its own.
        self._guessed: dict[torch.device | None, deque[Ticket]] = defaultdict(deque)
        self.noted_layers = 0  # routers of so many later layers are asked for a trace
        self.forget()

    def start_over(self) -> None:
        """No copy is under way."""
        self._guessed.clear()

    def forget(self) -> None:
        """Nothing is known of what was asked for, as at the beginning."""
        layers = len(self._cache.statistics.layers)
        self._predictor = make_predictor(self._lookahead.predictor, layers)

    def dropped(self, copy: Ticket) -> None:
        """`copy`, a guess's or another, will never land."""
        for copies in self._guessed.values():
            if copy in copies:
                copies.remove(copy)

    @property
    def weighs(self) -> bool:
        """Whether there is anything to weigh."""
        return self._balance is not None and self._lookahead.layers > 0

    def weigh(self, needed: int, copies: int, copy_seconds: float) -> None:
        """A step is over, for which `needed` experts were loaded; totals of all copies so far."""
        assert self._balance is not None
        self._balance.step(needed, copies, copy_seconds)

    def look(self, layer: Layer, chosen: Iterable[int] | None) -> list[Guess]:
        """Guess what the next layers will want and load it; `chosen`: what the one token wants."""
        hidden, layer.asked = layer.asked, None
        if chosen is None:  # of many tokens' experts nearly all are wanted: no need to guess
            return []
        wanted = list(chosen)
        if self._predictor is not None:
            self._predictor.observe(layer.index, wanted)
        near = self._layers[layer.index + 1 : layer.index + 1 + self._lookahead.layers]
        if self._balance is not None and not self._balance.worthwhile:
            near = ()
        near = [at for at in near if not self._link_is_behind(at, near, len(wanted))]
        if not near:
            return self._note_guesses(layer, hidden, ())
        begin = time.perf_counter()
        guesses = []
        for later in near:
            experts = self._guess(layer, later, hidden)
            if not experts:
                continue
            guesses.append(Guess(later.index, tuple(experts)))
            for use in self._cache.look_ahead(later.index, experts, most=len(experts)):
                self._guessed[later.device].append(self._start(later.index, use))
        if self._balance is not None:
            self._balance.guessed(time.perf_counter() - begin)
        return guesses + self._note_guesses(layer, hidden, near)

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
        """Whether as many guessed experts as would be guessed for those of the layers `near` that
        are on the device of `later`, `each` for one, still wait to be copied there."""
        copies = self._guessed[later.device]
        while copies and copies[0].done:
            copies.popleft()
        return len(copies) >= each * sum(at.device == later.device for at in near)

    def _note_guesses(
        self, layer: Layer, hidden: Tensor | None, guessed: Sequence[Layer]
    ) -> list[Guess]:
        """For a trace: what routers of layers not `guessed` for would say."""
        if hidden is None or not self.noted_layers:
            return []
        later = self._layers[layer.index + 1 : layer.index + 1 + self.noted_layers]
        said = (
            (at.index, at.guess(layer.as_seen_by(at, hidden))) for at in later if at not in guessed
        )
        return [Guess(index, tuple(experts), live=False) for index, experts in said]
