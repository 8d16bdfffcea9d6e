"""A step captured as one CUDA graph, once it has run a few times."""

import logging
import sys
from collections.abc import Callable, Sequence

import torch

from offload.generation.recovery import asked_bytes
from offload.lines import reason

logger = logging.getLogger("offload")

WARM_UPS = 3  # the first runs compile kernels and take workspaces


class Replay:
    """Runs a step: by Python at first, from a CUDA graph later. On a CPU always by Python."""

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        generator: Callable[[], torch.Generator],
        broke_off: Callable[[], None],
        spares: Callable[[int], bool],
    ) -> None:
        """`generator` gives the step's random numbers.

        `broke_off` is called when a capture fails: its queued work never ran, and the generator
        cannot be used any more. When a capture lacks memory, `spares(n)` says whether n bytes can
        be given back: if so, the call raises `torch.OutOfMemoryError`; else graphs are given up.
        """
        self._step, self.generator = step, generator
        self.broke_off, self.spares = broke_off, spares
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None  # once captured
        self._runs = 0
        self.refused = ""  # why the step could not be captured

    def __call__(self) -> None:
        if self.graph is None and self._stream is not None and not self.refused:
            if self._runs >= WARM_UPS:
                self._capture(self._stream)
            self._runs += 1
        if self.graph is not None:
            self.graph.replay()
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
        around = sys.exception()  # an exception that the caller is handling is not ours
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator())
        try:
            # "thread_local": other threads, which read disks and pin memory, may go on calling
            # CUDA. The outer `stream` puts the stream back where ending a capture fails.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()
        except BaseException as error:  # whatever a model, a library or the driver raises
            self.broke_off()
            torch.cuda.synchronize(stream.device)
            causes: list[BaseException] = [error]  # the latest first
            while (cause := causes[-1].__context__) is not None and cause is not around:
                causes.append(cause)
            self._refuse(causes)
            return
        self.graph = graph

    def _refuse(self, causes: Sequence[BaseException]) -> None:
        """Give up on CUDA graphs, but raise Ctrl-C and a shortage of memory that can be had again:
        the caller can handle those. `causes` has the latest exception first."""
        for cause in causes:
            if not isinstance(cause, Exception):
                raise cause
            # torch's allocator and the driver raise different errors.
            shortage = isinstance(cause, torch.OutOfMemoryError) or "out of memory" in str(cause)
            if shortage and self.spares(asked_bytes(cause)):
                raise torch.OutOfMemoryError(str(cause))
        # The latest of several says only that ending the failed capture failed, too.
        self.refused = reason(causes[min(1, len(causes) - 1)])
        logger.warning(
            "the decode step cannot be captured as a CUDA graph, so each of its kernels is "
            "launched by Python, slower (%s)",
            self.refused,
        )
