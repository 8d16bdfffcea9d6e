"""The decode loop: each step is queued before the token of the step before it is read."""

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
from offload.engine.handle import offload_of
from offload.generation.fixed_kv import CannotBeFixed, FixedKV
from offload.generation.graph import Replay
from offload.generation.recovery import NotSparedError, until_it_fits
from offload.generation.sampler import Sampler, check_trouble
from offload.generation.stream import forward
from offload.sampling import Sampling

logger = logging.getLogger("offload")

SHORTEST = 512  # tokens of the shortest KV cache; each longer size is twice the one before
Made = TypeVar("Made")


class Readback:
    """Brings small tensors to the host; two may be on their way at a time."""

    def __init__(self, like: Tensor) -> None:
        cuda = like.device.type == "cuda"
        self._places = [torch.empty_like(like, device="cpu", pin_memory=cuda) for _ in range(2)]
        self._here = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._sent = self._read = 0

    def send(self, what: Tensor) -> None:
        """Queue a copy of `what`, with the values it has after everything queued before."""
        at = self._sent % 2
        self._sent += 1
        assert self._sent - self._read <= 2, "nobody has read the one before"
        self._places[at].copy_(what, non_blocking=True)
        event = self._here[at]
        if event is not None:
            event.record(torch.cuda.current_stream(what.device))  # the stream of its own card

    def read(self) -> list[int]:
        """The values of the oldest tensor that was sent and not read."""
        at = self._read % 2
        self._read += 1
        event = self._here[at]
        if event is not None:
            event.synchronize()  # sync: the text is made on the host, a step behind
        values: list[int] = self._places[at].tolist()
        return values


class DecodeLoop:
    """A decode step with everything that it reads and writes, kept from one answer to the next."""

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        device: DevicePlanned,
        grown: Cache,
        length: int,
        sampling: Sampling,
        ends: tuple[int, ...],
    ) -> None:
        """Sequences have at most `length` tokens, in a KV cache with layers like those of `grown`.

        A token of `ends` halts the table of `device`, so that the steps after it decide nothing.
        Raises `CannotBeFixed`.
        """
        self.made_for = (length, sampling, ends)
        self.engine, self._device, self._model = engine, device, model
        self.kv, self._sampler = FixedKV(grown, length), Sampler(sampling, model.device)
        self._ends = torch.tensor([*ends, -1], device=model.device)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._ids = torch.zeros(1, length + 1, dtype=torch.int64, device=model.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=model.device)  # place in `_ids`
        # The token, whether its logits are in trouble, and the table's counts.
        counts = len(device.table.counts)
        self.said = torch.zeros(2 + counts, dtype=torch.int64, device=model.device)
        self._before = self._sampler.generator.get_state()  # as it was before the step queued last
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Start again with the present table and the present slots."""
        self.table = self._device.table
        self.replay = Replay(
            self._step,
            self._model.device,
            lambda: self._sampler.generator,
            self._capture_broke_off,
            self.engine.spares,
        )

    def begin(self, prompt: Tensor, logits: Tensor, grown: Cache, seed: int | None) -> None:
        """Queue the choice of the first token after `prompt` [1, T].

        `logits` [1, V] are those of the prompt's last token, and `grown` is the KV cache that the
        prompt left.
        """
        self.kv.fill(grown)
        self._sampler.reseed(seed)
        self.table.halted.zero_()
        # Places not written yet repeat the first token, which changes no repetition penalty.
        self._ids.copy_(prompt[:, :1].expand_as(self._ids))
        self._ids[:, : prompt.shape[1]] = prompt
        self._next.fill_(prompt.shape[1])
        self._say(logits)

    def run(self) -> None:
        """Queue a step."""
        self._before = self._sampler.generator.get_state()
        with self.engine.loop() as on_device:
            if self.table is not self._device.table:  # slots were given back
                self._begin_anew()
            if on_device:
                self.replay()
            else:
                self._step()

    def _step(self) -> None:
        try:
            self.table.halted.logical_or_((self._token == self._ends).any())
            out = self._model(
                input_ids=self._token, cache=self.kv, use_cache=True, logits_to_keep=1
            )
            self._say(out.logits[:, -1])
        except BaseException:
            self._device.come_together()  # otherwise a capture cannot be ended
            raise

    def _say(self, logits: Tensor) -> None:
        token, trouble = self._sampler.draw(self._ids, logits)
        self._token.copy_(token)
        self._ids.index_copy_(1, self._next, token)
        self._next.add_(1)
        self.said.copy_(torch.cat((token.view(1), trouble.view(1), self.table.counts)))

    def _capture_broke_off(self) -> None:
        self.engine.never_happened()
        self._sampler.go_back(self._before)

    def go_back(self, length: int) -> None:
        """Undo the step queued last, which may have broken off at any point.

        `length` tokens are in the KV cache, and one is chosen to be read next.
        """
        self._sampler.go_back(self._before)
        self._token.copy_(self._ids[:, length : length + 1])
        self._ids[:, length + 1 :] = self._ids[:, :1]
        self._next.fill_(length + 1)
        if not self.kv.cut(length):
            logger.warning("%d tokens are read again", length)
            ubatch = offload_of(self._model).fit.ubatch
            _, grown = forward(self._model, self._ids[:, :length], None, ubatch)
            self.kv.fill(grown)

    def close(self) -> None:
        """Free the memory now. Loop and graph refer to each other, so that otherwise it would wait
        for Python's collector."""
        del self.replay


class LoopTokens:
    """One sequence of tokens: each call gives the next one."""

    def __init__(self, loop: DecodeLoop, prompt_length: int, limit: int) -> None:
        """The first token is queued."""
        self._loop, self._prompt_length, self._limit = loop, prompt_length, limit
        self._readback = Readback(loop.said)
        self._readback.send(loop.said)
        self._queued, self._given = 1, 0  # tokens

    @torch.inference_mode()
    def __call__(self) -> int:
        if self._queued < self._limit:
            # Everything queued before a step that breaks off is valid, and each token but the last
            # was read.
            read = self._prompt_length + self._queued - 1
            until_it_fits(self._queue, self._loop.engine, lambda: self._loop.go_back(read))
        token, trouble, *counts = self._readback.read()
        check_trouble(trouble)
        self._loop.engine.count(counts)
        self._given += 1
        return token

    def _queue(self) -> None:
        self._loop.run()
        self._readback.send(self._loop.said)
        self._queued += 1

    @torch.inference_mode()
    def cache(self) -> Cache | None:
        read = self._prompt_length + self._given - 1
        return if_spared(
            lambda: self._loop.kv.grown(read),
            self._loop.engine,
            "to keep the KV cache, so the conversation is read again",
        )


class Loops:
    """The decode loop of a model, for one answer at a time."""

    def __init__(self, engine: Engine, device: DevicePlanned) -> None:
        """`device` is what plans steps for `engine` without asking the host."""
        self._engine, self._device = engine, device
        self.loop: DecodeLoop | None = None
        self._answer: weakref.ref[LoopTokens] | None = None
        self.refused = ""  # why this model has no decode loop

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
        size = SHORTEST
        while size < length + limit:
            size *= 2
        wanted = (min(size, longest), replace(sampling, seed=None), tuple(sorted(ends)))

        def begun() -> LoopTokens | None:
            with self._engine.loop() as on_device:
                if not on_device:
                    return None
                try:
                    loop = self.loop
                    if loop is None or (loop.made_for, loop.table) != (wanted, self._device.table):
                        del loop  # so that its memory is free before the next loop takes some
                        self._let_go()
                        loop = DecodeLoop(model, self._engine, self._device, grown, *wanted)
                        self.loop = loop
                    loop.begin(prompt, logits, grown, sampling.seed)
                except torch.OutOfMemoryError:
                    self._let_go()
                    raise
                return LoopTokens(loop, length, limit)

        try:
            answer = if_spared(
                begun,
                self._engine,
                "for a second KV cache, so every token waits for the one before",
            )
        except CannotBeFixed as error:
            self.refused = str(error)
            logger.warning(
                "decoding is slower than it could be, every token waits for the one before: %s",
                error,
            )
            return None
        if answer is not None:
            self._answer = weakref.ref(answer)
            self._device.counts_come = True
        return answer

    def _let_go(self) -> None:
        """Free the loop's memory."""
        if self.loop is not None:
            self.loop.close()
            self.loop = None


def if_spared(make: Callable[[], Made | None], engine: Engine, lost: str) -> Made | None:
    """The result of `make`, for which slots are given back while memory runs out.

    Once giving back more would leave the planning to the host, the result is None, and a warning
    says that there is no memory `lost`.
    """
    try:
        return until_it_fits(make, engine, spares=engine.spares)
    except NotSparedError:
        logger.warning("no memory %s", lost)
        return None
