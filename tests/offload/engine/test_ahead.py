"""When guessing stands back: its link is behind, and another card's link is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from offload.cache.cache import ExpertCache
from offload.cache.decision import Use
from offload.cache.policies import POLICIES

from offload.engine.ahead import Ahead

ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")
K = 2


class Guesses:
    """Layers asked in turn, whose routers all name the first experts."""

    def __init__(self, *devices: torch.device, landed: bool = False) -> None:
        self.layers: list[Any] = [
            SimpleNamespace(
                index=at,
                device=device,
                asked=None,
                as_seen_by=lambda _, hidden: hidden,
                guess=lambda _: list(range(K)),
            )
            for at, device in enumerate(devices)
        ]
        cache = ExpertCache(20, len(devices), POLICIES["lru"])
        self.started: list[int] = []  # layers that copies were begun for
        self._landed = landed
        self._ahead = Ahead(self.layers, cache, True, None, self._start)

    def _start(self, layer: int, use: Use) -> Any:
        self.started.append(layer)
        return SimpleNamespace(done=self._landed)

    def of(self, layer: int) -> list[int]:
        """Layers that copies are begun for at the step of `layer`."""
        self.started.clear()
        self.layers[layer].asked = torch.zeros(1)
        self._ahead.look(self.layers[layer], range(K))
        return self.started[:]


def test_no_guess_is_made_while_those_before_wait_for_the_link() -> None:
    guesses = Guesses(ONE, ONE, ONE)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == []


def test_guesses_go_on_when_those_before_have_landed() -> None:
    guesses = Guesses(ONE, ONE, ONE, landed=True)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == [2, 2]


def test_each_link_is_behind_for_itself() -> None:
    guesses = Guesses(ONE, ONE, OTHER, OTHER)
    assert guesses.of(0) == [1, 1]
    assert guesses.of(1) == [2, 2], "the other card's link is not behind"
    assert guesses.of(2) == []
