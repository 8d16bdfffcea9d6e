"""A step that is kept from one answer to the next, with what a step that broke off is undone by.

Knows: running a step with the slots and the table there are, and going back before one. Does not
know: when a step is queued (`offload.device.tokens`), what is in it (`offload.device.step`).
"""

from __future__ import annotations

import logging

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from offload.engine.device.engine import DeviceEngine
from offload.engine.handle import offload_of
from offload.generation.fixed_kv import FixedKV
from offload.generation.graph import Replay
from offload.generation.step_part import DecodeStep
from offload.generation.stream import forward
from offload.sampling import Sampler, Sampling

logger = logging.getLogger("offload")


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
        self._model, self._sampler = model, Sampler(sampling, model.device)
        self.step = DecodeStep(model, FixedKV(grown, length), self._sampler, ends, engine.table)
        self._before = self._sampler.state()  # the step queued last
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Run with the table and the slots that there are now."""
        self.step.table = self.engine.table
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
        """Let the memory go now: step and graph hold each other, so that it would wait for Python's
        collector."""
        del self.replay

    def run(self) -> None:
        """Queue a step."""
        self._before = self._sampler.state()
        with self.engine.loop() as on_device:
            if self.step.table is not self.engine.table:  # slots were given back
                self._begin_anew()
            if on_device:
                self.replay()
            else:
                self.step()

    def go_back(self, length: int) -> None:
        """Be as before the step queued last, which broke off: `length` tokens were read."""
        self._sampler.go_back(self._before)
        if not self.step.go_back(length):
            logger.warning("%d tokens are read again", length)
            ubatch = offload_of(self._model).options.ubatch
            _, grown = forward(self._model, self.step.read(length), None, ubatch)
            self.step.kv.fill(grown)

    def _whole_step(self) -> None:
        try:
            self.step()
        except BaseException:
            self.engine.come_together()  # or else a capture cannot be ended
            raise

    def _capture_broke_off(self) -> None:
        self.engine.broke_off()
        self._sampler.go_back(self._before)
