"""Tokens one behind: the next step is queued before the present step's token is read."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from offload.engine.device.engine import DevicePlanned
from offload.engine.engine import Engine
from offload.generation.fixed_kv import CannotBeFixed
from offload.generation.recovery import NotSparedError, until_it_fits
from offload.generation.sampler import check_trouble
from offload.generation.step import DecodeLoop, Readback
from offload.sampling import Sampling

logger = logging.getLogger("offload")

SHORTEST = 512  # tokens of the shortest KV cache; each longer size is twice the one before
Made = TypeVar("Made")


class LoopTokens:
    """One sequence of tokens: each call gives the next one."""

    def __init__(self, loop: DecodeLoop, prompt_length: int, limit: int) -> None:
        """The first token is queued."""
        self._loop, self._prompt_length, self._limit = loop, prompt_length, limit
        self._readback = Readback(loop.step.said)
        self._readback.send(loop.step.said)
        self._queued, self._given = 1, 0  # tokens

    @torch.inference_mode()
    def __call__(self) -> int:
        if self._queued < self._limit:
            until_it_fits(self._queue, self._loop.engine, self._go_back)
        token, trouble, *counts = self._readback.read()
        check_trouble(trouble)
        self._loop.engine.count(counts)
        self._given += 1
        return token

    def _queue(self) -> None:
        self._loop.run()
        self._readback.send(self._loop.step.said)
        self._queued += 1

    def _go_back(self) -> None:
        """Undo the step that broke off; everything queued before it is valid, and each token but
        the last was read."""
        self._loop.go_back(self._prompt_length + self._queued - 1)

    @torch.inference_mode()
    def cache(self) -> Cache | None:
        def grown() -> Cache | None:
            return self._loop.step.kv.grown(self._prompt_length + self._given - 1)

        return if_spared(grown, self._loop.engine, "to keep what was read: it is read again")


class Loops:
    """The decode loop of a model, for one answer at a time."""

    def __init__(self, engine: Engine, device: DevicePlanned) -> None:
        """`device` is what plans steps for `engine` without asking the host."""
        self._engine, self._device = engine, device
        self.loop: DecodeLoop | None = None
        self._answer: weakref.ref[LoopTokens] | None = None
        self.refused = ""  # why there is none for this model

    @torch.inference_mode()
    def begin(
        self,
        model: PreTrainedModel,
        prompt: Tensor,
        logits: Tensor,
        grown: object,
        sampling: Sampling,
        limit: int,
        longest: int,
        ends: frozenset[int],
    ) -> LoopTokens | None:
        """The tokens after `prompt` [1, T], at most `limit`, ended by one of `ends`.

        `logits` [1, V] are those of the prompt's last token, and `grown` is the KV cache that the
        prompt left. No sequence is longer than `longest`. None: the caller has to get tokens one by
        one.
        """
        busy = self._answer is not None and self._answer() is not None
        if self.refused or busy or not isinstance(grown, Cache):
            return None
        length = prompt.shape[1]

        def begun() -> LoopTokens | None:
            with self._engine.loop() as on_device:
                if not on_device:
                    return None
                try:
                    loop = self._loop_for(model, grown, length + limit, longest, sampling, ends)
                    loop.begin(prompt, logits, grown, sampling.seed)
                except torch.OutOfMemoryError:
                    self._let_go()
                    raise
                return LoopTokens(loop, length, limit)

        try:
            answer = if_spared(
                begun, self._engine, "for a second KV cache: every token waits for the last"
            )
        except CannotBeFixed as error:
            self.refused = str(error)
            logger.warning("every token waits for the one before: %s", error)
            return None
        if answer is not None:
            self._answer = weakref.ref(answer)
            self._device.counts_come = True
        return answer

    def _loop_for(
        self,
        model: PreTrainedModel,
        grown: Cache,
        needed: int,
        longest: int,
        sampling: Sampling,
        ends: frozenset[int],
    ) -> DecodeLoop:
        length = SHORTEST
        while length < needed:
            length *= 2
        asked = (min(length, longest), replace(sampling, seed=None), tuple(sorted(ends)))
        loop = self.loop
        if loop is not None and loop.made_for == asked and loop.step.table is self._device.table:
            return loop
        loop = None
        self._let_go()
        self.loop = DecodeLoop(model, self._engine, self._device, grown, *asked)
        return self.loop

    def _let_go(self) -> None:
        """Free the loop's memory."""
        if self.loop is not None:
            self.loop.close()
            self.loop = None


def if_spared(make: Callable[[], Made | None], engine: Engine, lost: str) -> Made | None:
    """The result of `make`, for which slots are given back while memory runs out.

    Never so many that the host would have to plan: then the result is None, and a warning says that
    there is no memory `lost`.
    """
    try:
        return until_it_fits(make, engine, spares=engine.spares)
    except NotSparedError:
        logger.warning("no memory %s", lost)
        return None
