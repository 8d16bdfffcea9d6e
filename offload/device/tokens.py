"""Tokens one behind: the next step is queued before this one's token is read.

Knows: when a step is queued and when a token is here. Does not know: what is in a step, text.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from offload.device.engine import DeviceEngine
from offload.device.graph import Replay
from offload.device.kv import CannotBeFixed, FixedKV
from offload.device.step import DecodeStep
from offload.sampling import Sampler, Sampling, check_trouble

logger = logging.getLogger("offload")

SHORTEST = 512  # tokens of the shortest KV cache; longer ones are twice as long each


class Readback:
    """Brings small tensors to the host, two on their way at a time."""

    def __init__(self, like: Tensor) -> None:
        cuda = like.device.type == "cuda"
        self._places = [torch.empty_like(like, device="cpu", pin_memory=cuda) for _ in range(2)]
        self._here = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._sent = self._read = 0

    def send(self, what: Tensor) -> None:
        """Queue a copy of `what`, as it is after all that is queued."""
        at = self._sent % 2
        self._sent += 1
        assert self._sent - self._read <= 2, "nobody has read the one before"
        self._places[at].copy_(what, non_blocking=True)
        event = self._here[at]
        if event is not None:
            event.record()

    def read(self) -> list[int]:
        """The oldest that was sent and not read."""
        at = self._read % 2
        self._read += 1
        event = self._here[at]
        if event is not None:
            event.synchronize()  # sync: the text is made on the host, a step behind
        values: list[int] = self._places[at].tolist()
        return values


class DecodeLoop:
    """A step that is kept from one answer to the next, and its graph."""

    def __init__(
        self,
        model: PreTrainedModel,
        engine: DeviceEngine,
        grown: Cache,
        length: int,
        sampling: Sampling,
        ends: tuple[int, ...],
    ) -> None:
        """Raises `CannotBeFixed`."""
        self.made_for = (length, sampling, ends)
        self.engine = engine
        sampler = Sampler(sampling, model.device)
        self.step = DecodeStep(model, FixedKV(grown, length), sampler, ends, engine.table)
        self.replay = Replay(self.step, model.device, sampler.generator, self._broke_off)

    def _broke_off(self) -> None:
        self.engine.broke_off()
        self.step.sampler.renew()

    def run(self) -> None:
        """Queue a step."""
        with self.engine.loop() as on_device:
            if on_device:
                self.replay()
            else:
                self.step()


class Answer:
    """One sequence: each call gives its next token."""

    def __init__(self, loop: DecodeLoop, prompt_length: int, limit: int) -> None:
        """The first token is queued."""
        self._loop, self._limit = loop, limit
        self._readback = Readback(loop.step.said)
        self._readback.send(loop.step.said)
        self._queued = 1
        self._length = prompt_length - 1  # of what was read before the token given last

    @torch.inference_mode()
    def __call__(self) -> int:
        loop = self._loop
        if self._queued < self._limit:
            loop.run()
            self._readback.send(loop.step.said)
            self._queued += 1
        token, trouble, *counts = self._readback.read()
        check_trouble(trouble)
        loop.engine.count(counts)
        self._length += 1
        return token

    @torch.inference_mode()
    def cache(self) -> Cache | None:
        return self._loop.step.kv.grown(self._length)


class Loops:
    """The decode loop of a model: one answer at a time."""

    def __init__(self, engine: DeviceEngine) -> None:
        self._engine = engine
        self._loop: DecodeLoop | None = None
        self._answer: weakref.ref[Answer] | None = None
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
    ) -> Answer | None:
        """The tokens after `prompt` [1, T], at most `limit`, ended by one of `ends`.

        `logits` [1, V] are of the prompt's last token, `grown` is the KV cache it left; no sequence
        is longer than `longest`. None: tokens have to be had one by one.
        """
        busy = self._answer is not None and self._answer() is not None
        if self.refused or busy or not isinstance(grown, Cache):
            return None
        with self._engine.loop() as on_device:
            if not on_device:
                return None
            try:
                loop = self._loop_for(
                    model, grown, prompt.shape[1] + limit, longest, sampling, ends
                )
                loop.step.kv.fill(grown)
            except torch.OutOfMemoryError:
                logger.warning("no memory for a second KV cache: every token waits for the last")
                return None
            except CannotBeFixed as error:
                self.refused = str(error)
                logger.warning("every token waits for the one before: %s", error)
                return None
            loop.step.sampler.reseed(sampling.seed)
            loop.step.begin(prompt, logits)
            answer = Answer(loop, prompt.shape[1], limit)
            self._answer = weakref.ref(answer)
            self._engine.counts_come = True
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
        loop = self._loop
        if loop is None or loop.made_for != asked or loop.step.table is not self._engine.table:
            self._loop = loop = None  # first: its memory may be needed
            self._loop = loop = DecodeLoop(model, self._engine, grown, *asked)
        return loop
