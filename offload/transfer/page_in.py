"""Bringing a mapped record into memory before it is touched, where it has left it.

Knows: which pages the system has, reading the others several at a time. Does not know: who wants
the record, where it goes.

A mapping that is just touched is read a fault at a time, a read-ahead window each (128 KiB as a
rule), and the disk is idle in between: docs/log.md has the figures.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from offload.quant.pack import Pack
from offload.transfer.memory import PAGE, in_pages

READERS = 8
PIECE = 256 << 10  # bytes of a read
AT_ONCE = 32  # reads before looking at whatever is more urgent


class PageIn:
    """Reads the missing parts of records with several threads. Nothing is kept: the system does.

    Where the system cannot be asked what it has, or has no such reads, nothing is done: the
    mapping works all the same.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._mincore = _mincore() if hasattr(os, "preadv") else None
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="offload-page-in")
        self._local = threading.local()

    def bring_in(self, layer: int, expert: int, between: Callable[[], None] | None = None) -> None:
        """Return when the record's pages are in memory. `between` is called now and then; it may
        bring in another. Raises `PackError`."""
        missing = self._missing(layer, expert)
        if not missing:
            return
        while missing:
            some, missing = missing[:AT_ONCE], missing[AT_ONCE:]
            for _ in self._threads.map(lambda at: self._read(layer, at), some):
                pass
            if between is not None and missing:
                between()

    def _missing(self, layer: int, expert: int) -> list[int]:
        """Where in its file the pieces of a record begin that are not in memory as a whole."""
        if self._mincore is None:
            return []
        record = self._pack.record(layer, expert)
        first = record.data_ptr() // PAGE * PAGE
        size = in_pages(record.data_ptr() + record.nbytes - first)
        pages = ctypes.create_string_buffer(size // PAGE)
        if self._mincore(ctypes.c_void_p(first), ctypes.c_size_t(size), pages):
            return []
        here = bytes(page & 1 for page in pages.raw)
        if 0 not in here:
            return []
        begin = self._pack.place(layer, expert)[1] - (record.data_ptr() - first)
        step = PIECE // PAGE
        return [begin + at * PAGE for at in range(0, len(here), step) if 0 in here[at : at + step]]

    def _read(self, layer: int, begin: int) -> None:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = memoryview(bytearray(PIECE))
        self._pack.read_at(layer, begin, self._local.scratch)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _mincore() -> Any:
    """The system's answer to which pages are in memory, or None where it has none."""
    return getattr(ctypes.CDLL(None), "mincore", None)
