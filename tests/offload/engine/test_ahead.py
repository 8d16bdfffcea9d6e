"""Guessing stands back while the link is behind, and each card has a link of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.cache.cache import ExpertCache
from offload.cache.policies import POLICIES
from offload.engine.ahead import Ahead
from offload.engine.layer import Call

ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")
EXPERTS, K = 8, 2


class Guesses:
    """Layers asked in turn, whose routers all name the first experts."""

    def __init__(self, *devices: torch.device, landed: bool = False, balance: Any = None) -> None:
        self.layers: list[Any] = [
            SimpleNamespace(
                index=at,
                device=device,
                asked=None,
                num_experts=EXPERTS,
                as_seen_by=lambda _, hidden: hidden,
                guess=lambda _: list(range(K)),
            )
            for at, device in enumerate(devices)
        ]
        self._landed = landed
        cache = ExpertCache(20, len(devices), POLICIES["lru"])
        self.ahead = Ahead(self.layers, cache, SimpleNamespace(busy_seconds=0.0), True, balance)

    def of(self, layer: int) -> list[int]:
        """Layers that copies are begun for at the step of `layer`."""
        self.layers[layer].asked = hidden = torch.zeros(1, 4)
        index = torch.arange(K)[None]
        call = Call(self.layers[layer], hidden, index, torch.ones(1, K), False)
        _, wanted = self.ahead.look(call)
        self.ahead.begun([(later, SimpleNamespace(done=self._landed)) for later, _ in wanted])
        return [later.index for later, _ in wanted]


def test_no_guess_is_made_while_earlier_ones_wait_for_the_link() -> None:
    guesses = Guesses(ONE, ONE, ONE)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == []


def test_guesses_go_on_once_earlier_ones_have_landed() -> None:
    guesses = Guesses(ONE, ONE, ONE, landed=True)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == [2, 2]


def test_each_link_is_judged_by_its_own_copies() -> None:
    guesses = Guesses(ONE, ONE, OTHER, OTHER)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == [2, 2], "the other card's link is not behind"
    assert guesses.of(2) == []


def test_the_time_after_a_guess_that_broke_off_is_not_what_a_guess_costs() -> None:
    costs: list[float] = []
    balance = SimpleNamespace(worthwhile=True, guessed=costs.append)
    guesses = Guesses(ONE, ONE, balance=balance)
    guess, guesses.layers[1].guess = guesses.layers[1].guess, interrupted
    with pytest.raises(KeyboardInterrupt):
        guesses.of(0)
    guesses.layers[1].guess = guess
    guesses.ahead.started_over()
    guesses.of(1)  # the last layer guesses nothing
    assert not costs
    guesses.of(0)
    assert len(costs) == 1


def interrupted(_: Any) -> list[int]:
    raise KeyboardInterrupt
