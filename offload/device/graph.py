"""A step captured as one CUDA graph, once it has run a few times.

Knows: warming up, capturing, replaying, and that a step which cannot be captured still runs. Does
not know: what a step is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from offload.errors import reason

logger = logging.getLogger("offload")

WARM_UPS = 3  # kernels are compiled, workspaces taken, in the first runs


class Replay:
    """Runs a step: as it is at first, from a graph later. On a CPU always as it is."""

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        generator: torch.Generator,
        broke_off: Callable[[], None],
    ) -> None:
        """`generator`: of the step's random numbers. `broke_off` is told when a capture failed:
        what was queued by it never happened, and the generator cannot be used any more."""
        self._step, self._generator, self._broke_off = step, generator, broke_off
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0
        self.refused = ""  # why it could not be captured

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is None and self._stream is not None and not self.refused:
            if self._runs >= WARM_UPS:
                self._capture(self._stream)
            self._runs += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._stream is None:
            self._step()
        else:
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._step()
            current.wait_stream(self._stream)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            # Other threads, which read disks and pin memory, may go on calling CUDA.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
        except Exception as error:  # whatever a model, a library or the driver raises
            first = error.__context__ or error  # ending a capture that failed fails, too
            self.refused = reason(first)
            self._broke_off()
            torch.cuda.synchronize(stream.device)
            logger.warning(
                "the decode step cannot be captured as a CUDA graph, so each of its kernels is "
                "launched by Python, slower (%s)",
                self.refused,
            )
            return
        self._graph = graph
