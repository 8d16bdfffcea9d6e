"""A step captured as one CUDA graph, once it has run a few times.

Knows: warming up, capturing, replaying, and that a step which cannot be captured still runs. Does
not know: what a step is, where memory for a graph comes from.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from offload.generation.recovery import asked_bytes
from offload.lines import reason

logger = logging.getLogger("offload")

WARM_UPS = 3  # kernels are compiled, workspaces taken, in the first runs


class Replay:
    """Runs a step: as it is at first, from a graph later. On a CPU always as it is."""

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        generator: Callable[[], torch.Generator],
        broke_off: Callable[[], None],
        spares: Callable[[int], bool],
    ) -> None:
        """`generator`: of the step's random numbers. `broke_off` is told when a capture failed:
        what was queued by it never happened, and the generator cannot be used any more. `spares`:
        whether so many bytes can be had for a graph; then calling raises `torch.OutOfMemoryError`
        when a capture lacks them."""
        self._step, self._generator = step, generator
        self._broke_off, self._spares = broke_off, spares
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
                try:
                    self._step()
                finally:
                    current.wait_stream(self._stream)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        around = sys.exception()  # what the caller is handling has nothing to do with this
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator())
        try:
            # Other threads, which read disks and pin memory, may go on calling CUDA. Where ending a
            # capture fails, the stream before is not put back: the outer one does that.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()
        except BaseException as error:  # whatever a model, a library or the driver raises
            self._broke_off()
            torch.cuda.synchronize(stream.device)
            self._refuse([*_with_causes(error, around)])
            return
        self._graph = graph

    def _refuse(self, causes: Sequence[BaseException]) -> None:
        """Capture no more, unless one of `causes`, the latest first, is for somebody else: Ctrl-C,
        and a lack of memory that can be had."""
        for cause in causes:
            if not isinstance(cause, Exception):
                raise cause
            if _is_shortage(cause) and self._spares(asked_bytes(cause)):
                raise torch.OutOfMemoryError(str(cause))
        self.refused = reason(causes[min(1, len(causes) - 1)])  # ending one that failed fails, too
        logger.warning(
            "the decode step cannot be captured as a CUDA graph, so each of its kernels is "
            "launched by Python, slower (%s)",
            self.refused,
        )


def _with_causes(
    error: BaseException | None, around: BaseException | None
) -> Iterator[BaseException]:
    while error is not None and error is not around:
        yield error
        error = error.__context__


def _is_shortage(error: Exception) -> bool:
    """Torch's allocator and the driver say it each in their own way."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
