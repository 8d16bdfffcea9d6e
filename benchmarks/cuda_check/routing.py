"""Routers that choose what a trace says.

Knows: a synthetic trace as tensors on the device, a step counter that lies there too, so that a
captured graph follows the trace; what a router is asked and answers. Does not know: engines.

Letters: P prompt tokens, S steps, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.cache.trace.trace import Trace


@dataclass(frozen=True)
class LayerRoutes:
    """What one layer's router says."""

    prompt: Tensor  # [P, k]
    chosen: Tensor  # [S, k]
    guessed: Tensor  # [S, k]: when it is asked one layer early


class Routes:
    """A trace for the routers of a model, which goes on over prompts until it is begun anew."""

    def __init__(self, trace: Trace, device: torch.device) -> None:
        """`trace`: a prompt, then tokens one by one, with guesses one layer ahead."""
        layers = range(trace.header.layers)
        prompt: list[list[tuple[int, ...]]] = [[] for _ in layers]
        chosen: list[list[tuple[int, ...]]] = [[] for _ in layers]
        guessed: list[list[tuple[int, ...]]] = [[] for _ in layers]
        for event in trace.events:
            (prompt if event.prompt else chosen)[event.layer] += event.experts
            for guess in event.guesses:
                guessed[guess.layer].append(guess.experts)
        guessed[0] = chosen[0]  # nobody is before it
        self.layers = [
            LayerRoutes(*(torch.tensor(rows, device=device) for rows in layer))
            for layer in zip(prompt, chosen, guessed, strict=True)
        ]
        self.steps = len(chosen[0])
        self.step = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self, step: int) -> None:
        """The next token is the trace's `step`."""
        self.step.fill_(step)

    def choose(self, layer: int, tokens: int) -> Tensor:
        """The experts [T, k] of this step; the last layer ends it. Of a prompt they are the
        prompt's."""
        routes = self.layers[layer]
        if tokens > 1:
            turns = -(-tokens // len(routes.prompt))
            return routes.prompt.repeat(turns, 1)[:tokens]
        ids = routes.chosen.index_select(0, self.step)  # [1, k]
        if layer == len(self.layers) - 1:
            self.step.add_(1).remainder_(self.steps)
        return ids

    def guess(self, layer: int) -> Tensor:
        """What is guessed of this step's experts [1, k] a layer before."""
        return self.layers[layer].guessed.index_select(0, self.step)


class TracedRouter:
    """Takes the place of a router's `forward`: its own work is done, its choice is the trace's."""

    def __init__(self, routes: Routes, layer: int, router: nn.Module) -> None:
        self._routes, self._layer = routes, layer
        self._forward = router.forward
        self._called = False  # by the model; else by one who guesses, without hooks
        self._hook = router.register_forward_pre_hook(self._note_call)
        router.forward = self

    def _note_call(self, *_: object) -> None:
        self._called = True

    def __call__(self, hidden: Tensor, *rest: Any) -> tuple[Any, ...]:
        called, self._called = self._called, False
        answer = self._forward(hidden, *rest)  # logits, weights [T, k], index [T, k]
        if called:
            ids = self._routes.choose(self._layer, len(answer[2]))
        else:
            ids = self._routes.guess(self._layer)
        return (*answer[:2], ids, *answer[3:])


def drive(routers: Sequence[nn.Module | None], routes: Routes) -> None:
    """Let `routes` choose in place of every router of a model, layer by layer."""
    for layer, router in enumerate(routers):
        assert router is not None, "the models that are measured have routers"
        TracedRouter(routes, layer, router)
