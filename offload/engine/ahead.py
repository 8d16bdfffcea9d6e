"""Looking ahead: what later layers will want is guessed, and its copies are begun.

Knows: who is asked for a guess, when guessing stands back, what a trace is told of it. Does not
know: which guess may load or evict (`cache`), how a copy is carried out (`offload.engine`).

One more sync a layer, where routers are asked.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Sequence

import torch
from torch import Tensor

from offload.cache.decision import Use
from offload.cache.guesses import LookaheadBalance
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
        lookahead: bool,
        balance: LookaheadBalance | None,
        start: Callable[[int, Use], Ticket],
    ) -> None:
        """`start` begins the copy of a guessed expert of a layer. Without `lookahead` nothing is
        guessed. With `balance` guessing stops while it does not pay; with None it never stops."""
        self._layers = layers
        self._cache = cache
        self._lookahead = lookahead
        self._balance = balance
        self._start = start
        # Copies of guesses that may not have landed, for each device: each has a link of its own.
        self._guessed: dict[torch.device | None, deque[Ticket]] = defaultdict(deque)
        self.noted_layers = 0  # routers of so many later layers are asked for a trace

    def start_over(self) -> None:
        """No copy is under way."""
        self._guessed.clear()

    def dropped(self, copy: Ticket) -> None:
        """`copy`, a guess's or another, will never land."""
        for copies in self._guessed.values():
            if copy in copies:
                copies.remove(copy)

    @property
    def weighs(self) -> bool:
        """Whether there is anything to weigh."""
        return self._balance is not None and self._lookahead

    def weigh(self, needed: int, copies: int, copy_seconds: float) -> None:
        """A step is over, for which `needed` experts were loaded; totals of all copies so far."""
        assert self._balance is not None
        self._balance.step(needed, copies, copy_seconds)

    def look(self, layer: Layer, chosen: Iterable[int] | None) -> list[Guess]:
        """Guess what the layer after `layer` will want and begin to load it.

        `chosen` has the experts that the one token wants here, or is None for many tokens, which
        want nearly all experts anyway.
        """
        hidden, layer.asked = layer.asked, None
        if chosen is None or hidden is None:
            return []
        later = self._layers[layer.index + 1 : layer.index + 2] if self._lookahead else ()
        if self._balance is not None and not self._balance.worthwhile:
            later = ()
        guesses = []
        for near in later:
            if self._link_is_behind(near, len(list(chosen))):
                break
            begin = time.perf_counter()
            if experts := near.guess(layer.as_seen_by(near, hidden)):
                guesses.append(Guess(near.index, tuple(experts)))
                for use in self._cache.look_ahead(near.index, experts, most=len(experts)):
                    self._guessed[near.device].append(self._start(near.index, use))
            if self._balance is not None:
                self._balance.guessed(time.perf_counter() - begin)
        return guesses + self._note_guesses(layer, hidden, {guess.layer for guess in guesses})

    def _link_is_behind(self, later: Layer, most: int) -> bool:
        """Whether at least `most` guessed experts still wait for their copy to the device of
        `later`."""
        copies = self._guessed[later.device]
        while copies and copies[0].done:
            copies.popleft()
        return len(copies) >= most

    def _note_guesses(self, layer: Layer, hidden: Tensor, guessed: Container[int]) -> list[Guess]:
        """For a trace: what the routers of later layers would say, those `guessed` for excepted."""
        later = self._layers[layer.index + 1 : layer.index + 1 + self.noted_layers]
        said = (
            (at.index, at.guess(layer.as_seen_by(at, hidden)))
            for at in later
            if at.index not in guessed
        )
        return [Guess(index, tuple(experts), live=False) for index, experts in said]
