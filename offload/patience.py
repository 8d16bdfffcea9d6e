"""Running a program that came with a model, for as long as it deserves.

Knows: how to give up on it: by time and by the memory this process has taken meanwhile. Does not
know: what it does. It must be Python code, a template in jinja's sandbox say: it is stopped at its
next instruction.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
LOOK_SECONDS = 0.02


class OutOfPatience(Exception):
    """It took too long, or too much memory."""


def patiently(call: Callable[[], T], *, seconds: float, most_bytes: int) -> T:
    """What `call()` returns or raises. Raises `OutOfPatience`."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    before = _own_memory()
    worker = threading.Thread(target=run, name="offload-template", daemon=True)
    worker.start()
    waited = 0.0
    try:
        while True:
            worker.join(LOOK_SECONDS)
            if not worker.is_alive():
                break
            waited += LOOK_SECONDS
            if waited > seconds or _own_memory() - before > most_bytes:
                raise OutOfPatience
    finally:  # Ctrl-C ends it, too
        while worker.is_alive():
            _raise_in(worker, OutOfPatience)
            worker.join(LOOK_SECONDS)
    if errors:
        raise errors[0]
    return results[0]


def _own_memory() -> int:
    """Bytes of this process's memory that are no pages of files: a pack that is read meanwhile is
    not the program's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(error)
    )
