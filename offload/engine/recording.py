"""Writes down what the routers chose. An answer goes on when the disk is full."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from offload.cache.policies import Key
from offload.cache.trace.file import TraceWriter
from offload.cache.trace.trace import Event, Guess, TraceError, TraceHeader
from offload.engine.layer import Call
from offload.errors import SourceError
from offload.files import user_path

logger = logging.getLogger("offload")


class RoutingTrace:
    """A routing trace being written; each event is whole before the next begins.

    Told by the engine: see `engine.host.Watcher`.
    """

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

    def served(self, call: Call, guesses: Sequence[Guess], copies: int) -> None:
        """Write one call; a choice past the layer's experts is a sentinel, and left out."""
        rows, marks = [], []
        scores = call.weights.tolist()  # sync: only while a routing trace is recorded
        for row, mark in zip(call.chosen, scores, strict=True):
            kept = [
                (e, score)
                for e, score in zip(row, mark, strict=True)
                if 0 <= e < call.layer.num_experts
            ]
            rows.append(tuple(e for e, _ in kept))
            marks.append(tuple(score for _, score in kept))
        layer, prompt = call.layer.index, call.prompt
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
