"""A decode step that is kept from one answer to the next, and how a step is undone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from offload.engine.device.engine import DevicePlanned
from offload.engine.device.table import Table
from offload.engine.engine import Engine
from offload.engine.handle import offload_of
from offload.generation.fixed_kv import FixedKV
from offload.generation.graph import Replay
from offload.generation.sampler import Sampler
from offload.generation.stream import forward
from offload.sampling import Sampling


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


class DecodeStep:
    """Everything a step reads and writes."""

    def __init__(
        self,
        model: PreTrainedModel,
        kv: FixedKV,
        sampler: Sampler,
        ends: Sequence[int],
        table: Table,
    ) -> None:
        """A token of `ends` halts the `table`, so that the steps after it decide nothing."""
        device = model.device
        self.kv, self.sampler = kv, sampler
        self._model = model
        self._ends = torch.tensor([*ends, -1], device=device)
        self.table = table
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._ids = torch.zeros(1, kv.length + 1, dtype=torch.int64, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)  # place in `_ids`
        # The token, whether its logits are in trouble, and the table's counts.
        self.said = torch.zeros(2 + len(table.counts), dtype=torch.int64, device=device)

    def begin(self, prompt: Tensor, logits: Tensor) -> None:
        """Choose the first token after `prompt` [1, T], from the `logits` [1, V] of its last."""
        self.table.halted.zero_()
        # Places not written yet repeat the first token, which changes no repetition penalty.
        self._ids.copy_(prompt[:, :1].expand_as(self._ids))
        self._ids[:, : prompt.shape[1]] = prompt
        self._next.fill_(prompt.shape[1])
        self._say(logits)

    def go_back(self, length: int) -> bool:
        """Undo a step that broke off anywhere: `length` tokens are in the KV cache, and one is
        chosen to be read next. False: the KV cache has to be filled anew with those tokens."""
        self._token.copy_(self._ids[:, length : length + 1])
        self._ids[:, length + 1 :] = self._ids[:, :1]
        self._next.fill_(length + 1)
        return self.kv.cut(length)

    def read(self, length: int) -> Tensor:
        """The first `length` tokens [1, length]."""
        return self._ids[:, :length]

    def __call__(self) -> None:
        self.table.halted.logical_or_((self._token == self._ends).any())
        out = self._model(input_ids=self._token, cache=self.kv, use_cache=True, logits_to_keep=1)
        self._say(out.logits[:, -1])

    def _say(self, logits: Tensor) -> None:
        token, trouble = self.sampler.draw(self._ids, logits)
        self._token.copy_(token)
        self._ids.index_copy_(1, self._next, token)
        self._next.add_(1)
        self.said.copy_(torch.cat((token.view(1), trouble.view(1), self.table.counts)))


logger = logging.getLogger("offload")


class DecodeLoop:
    """A step that is kept from one answer to the next, and its CUDA graph."""

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
        """Raises `CannotBeFixed`."""
        self.made_for = (length, sampling, ends)
        self.engine, self._device = engine, device
        self._model, self._sampler = model, Sampler(sampling, model.device)
        self.step = DecodeStep(model, FixedKV(grown, length), self._sampler, ends, device.table)
        self._before = self._sampler.state()  # as it was before the step queued last
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Run with the table and the slots that there are now."""
        self.step.table = self._device.table
        self.replay = Replay(
            self._whole_step,
            self._model.device,
            lambda: self._sampler.generator,
            self._capture_broke_off,
            self.engine.spares,
        )

    def begin(self, prompt: Tensor, logits: Tensor, grown: Cache, seed: int | None) -> None:
        """Queue the choice of the first token after `prompt`, which left `grown`."""
        self.step.kv.fill(grown)
        self._sampler.reseed(seed)
        self.step.begin(prompt, logits)

    def close(self) -> None:
        """Free the memory now. Step and graph refer to each other, so that otherwise it would wait
        for Python's collector."""
        del self.replay

    def run(self) -> None:
        """Queue a step."""
        self._before = self._sampler.state()
        with self.engine.loop() as on_device:
            if self.step.table is not self._device.table:  # slots were given back
                self._begin_anew()
            if on_device:
                self.replay()
            else:
                self.step()

    def go_back(self, length: int) -> None:
        """Undo the step queued last, which broke off; `length` tokens were read before it."""
        self._sampler.go_back(self._before)
        if not self.step.go_back(length):
            logger.warning("%d tokens are read again", length)
            ubatch = offload_of(self._model).fit.ubatch
            _, grown = forward(self._model, self.step.read(length), None, ubatch)
            self.step.kv.fill(grown)

    def _whole_step(self) -> None:
        try:
            self.step()
        except BaseException:
            self._device.come_together()  # otherwise a capture cannot be ended
            raise

    def _capture_broke_off(self) -> None:
        self.engine.never_happened()
        self._sampler.go_back(self._before)
