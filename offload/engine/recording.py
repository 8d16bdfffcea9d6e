"""Writing down what the routers chose.

Knows: when a trace begins and ends, and that an answer goes on when the disk is full. Does not
know: the file's format (`cache.trace_file`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from offload.cache.errors import TraceError
from offload.cache.policies import Key
from offload.cache.trace.file import TraceWriter
from offload.cache.trace.trace import Event, Guess, TraceHeader
from offload.errors import SourceError
from offload.files import user_path

logger = logging.getLogger("offload")


class Recorder:
    """A trace being written; each event is whole before the next begins."""

    def __init__(self, path: str | Path, header: TraceHeader) -> None:
        try:
            self._writer = TraceWriter(user_path(path), header)
        except TraceError as error:
            raise SourceError(str(error)) from None
        self._full = False  # the disk
        self._fresh = False
        self._warmed: list[Key] = []

    def started_over(self) -> None:
        """The slots were emptied."""
        self._fresh = True
        self._warmed.clear()

    def warmed(self, key: Key) -> None:
        """A warm start loaded `key`."""
        self._warmed.append(key)

    def note(
        self,
        layer: int,
        prompt: bool,
        chosen: Sequence[Sequence[int]],
        scores: Sequence[Sequence[float]],
        experts: int,
        guesses: Sequence[Guess],
    ) -> None:
        """One call of a layer of `experts` experts; a choice past them is a sentinel."""
        rows, marks = [], []
        for row, mark in zip(chosen, scores, strict=True):
            kept = [(e, score) for e, score in zip(row, mark, strict=True) if 0 <= e < experts]
            rows.append(tuple(e for e, _ in kept))
            marks.append(tuple(score for _, score in kept))
        event = Event(layer, prompt, tuple(rows), tuple(marks), tuple(guesses), self._fresh)
        if not self._full:
            try:
                self._writer.append(event._replace(warmed=tuple(self._warmed)))
            except TraceError as error:
                self._stop(error)
        self._fresh = False
        self._warmed.clear()

    def close(self) -> None:
        try:
            self._writer.close()
        except TraceError as error:
            self._stop(error)

    def _stop(self, error: TraceError) -> None:
        self._full = True
        logger.warning("%s; the trace ends before the run does", error)
