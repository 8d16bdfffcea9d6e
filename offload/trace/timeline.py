"""Recording who was busy when, while a model runs.

Knows: the clock, and that a step's work comes in a row, so that one mark ends a span and begins
the next. Does not know: the file's format (`cache.timeline`), what is worth a mark (`engine`).

On a GPU the marks are the host's: they show when work was queued, not when it ran. Copies are timed
on the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from offload import files
from offload.cache.trace.timeline import Span, Timeline
from offload.engine.handle import offload_of
from offload.quant.errors import OffloadError
from offload.transfer.base import NO_MARKS

SHORTEST = 2e-6  # seconds


class Recorder:
    """Marks of one engine's compute and copies, on the clock of `time.perf_counter`."""

    def __init__(self, process: str, links: Sequence[int] = ()) -> None:
        """`links`: the card of each layer, where there are several."""
        self._links = links
        self.timeline = Timeline(process)
        self._last = time.perf_counter()

    def mark(self, name: str, layer: int, expert: int | None = None) -> None:
        """What was going on since the last mark was `name`."""
        now = time.perf_counter()
        if now - self._last < SHORTEST:
            return  # the next span takes it in
        label = f"{name} ({layer})" if expert is None else f"{name} {expert} ({layer})"
        self.timeline.add(Span("compute", label, self._last, now - self._last, layer, expert))
        self._last = now

    def copied(self, layer: int, expert: int, urgent: bool, begin: float, seconds: float) -> None:
        """A copy of a record ran from `begin` on. Called by the copy thread."""
        label = f"{'load' if urgent else 'guess'} {layer}/{expert}"
        track = f"link {self._links[layer]}" if self._links else "link"
        self.timeline.add(Span(track, label, begin, seconds, layer, expert))


@contextlib.contextmanager
def recording(model: PreTrainedModel, file: Path | None) -> Iterator[None]:
    """Record what `model` does meanwhile and write it to `file`, also when it breaks off.

    None: record nothing. Raises `OffloadError` before anything runs where `file` cannot be written.
    """
    if file is None:
        yield
        return
    check_writable(file)
    offload = offload_of(model)
    links = [card.number for card, share in offload.fit.caching for _ in range(share.moe_layers)]
    recorder = Recorder(f"offload {offload.pack.info.source}", links)
    offload.engine.tell(recorder)
    try:
        yield
    finally:
        offload.engine.tell(NO_MARKS)
        write(recorder.timeline, file)


def check_writable(file: Path) -> None:
    """Raise `OffloadError` now where `write` would raise it later."""
    try:
        files.check_writable(file)
    except OSError as error:
        raise _unwritable(file, error) from None


def write(timeline: Timeline, file: Path) -> None:
    """Write `timeline` to `file`. Raises `OffloadError`."""
    try:
        timeline.write(file)
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> OffloadError:
    return OffloadError(
        f"cannot write the timeline to {file} ({error.strerror}): name another --timeline"
    )
