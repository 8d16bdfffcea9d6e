"""Guessing stands back while the link is behind, and each card has a link of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from offload.cache.cache import ExpertCache
from offload.cache.guesses import Lookahead
from offload.cache.policies import POLICIES

from offload.engine.ahead import Ahead
from offload.engine.layer import Call

ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")
EXPERTS, K = 8, 2


class Guesses:
    """Layers asked in turn, each expecting the experts of the token before."""

    def __init__(self, devices: tuple[torch.device, ...], ahead: int) -> None:
        self.layers: list[Any] = [
            SimpleNamespace(index=at, device=device, asked=None, num_experts=EXPERTS)
            for at, device in enumerate(devices)
        ]
        cache = ExpertCache(20, len(devices), POLICIES["lru"])
        self.landed = False
        look = Lookahead("previous", ahead)
        self._ahead = Ahead(self.layers, cache, look, None)
        for layer in self.layers:  # the token before
            self.of(layer.index)

    def of(self, layer: int) -> list[int]:
        """Layers that copies are begun for at the step of `layer`."""
        index = torch.arange(K)[None]
        call = Call(self.layers[layer], torch.zeros(1, 4), index, torch.ones(1, K), False)
        _, wanted = self._ahead.look(call)
        for later, _ in wanted:
            self._ahead.begun(later, SimpleNamespace(done=self.landed))
        return [later.index for later, _ in wanted]


def test_no_guess_is_made_while_earlier_ones_wait_for_the_link() -> None:
    guesses = Guesses((ONE, ONE, ONE), ahead=1)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == []
    guesses = Guesses((ONE, ONE, ONE), ahead=1)
    guesses.landed = True
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == [2, 2]


def test_the_link_of_another_card_is_not_behind() -> None:
    guesses = Guesses((ONE, ONE, OTHER), ahead=1)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == [2, 2]


def test_each_link_is_judged_by_its_own_copies() -> None:
    guesses = Guesses((ONE, ONE, OTHER, OTHER), ahead=2)
    assert guesses.of(0) == [1, 1, 2, 2]
    assert guesses.of(1) == [3, 3], "two more on the other link, where two may wait for each layer"
    assert guesses.of(2) == []
