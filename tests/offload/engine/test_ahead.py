"""Guessing stands back while the link is behind, and each card has a link of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from offload.cache.cache import ExpertCache
from offload.cache.policies import POLICIES
from offload.engine.ahead import Ahead
from offload.engine.layer import Call

ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")
EXPERTS, K = 8, 2


class Guesses:
    """Layers asked in turn, whose routers all name the first experts."""

    def __init__(self, *devices: torch.device, landed: bool = False) -> None:
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
        self._ahead = Ahead(self.layers, cache, SimpleNamespace(busy_seconds=0.0), True, None)

    def of(self, layer: int) -> list[int]:
        """Layers that copies are begun for at the step of `layer`."""
        self.layers[layer].asked = hidden = torch.zeros(1, 4)
        index = torch.arange(K)[None]
        call = Call(self.layers[layer], hidden, index, torch.ones(1, K), False)
        _, wanted = self._ahead.look(call)
        self._ahead.begun([(later, SimpleNamespace(done=self._landed)) for later, _ in wanted])
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
