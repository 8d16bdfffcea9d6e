"""Running a program that came with a model, for as long as it deserves.

Knows: how to give up on it: by time and by the memory this process has taken meanwhile. Does not
know: what it does. It must be Python code, a template in jinja's sandbox say: it is stopped at its
next instruction.
"""

from __future__ import annotations

import _thread
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
LOOK_SECONDS = 0.02
BEGIN_SECONDS = 5.0  # after which a thread will not begin any more, however busy the machine


class OutOfPatience(Exception):
    """It took too long, or too much memory."""


def patiently(call: Callable[[], T], *, seconds: float, most_bytes: int) -> T:
    """What `call()` returns or raises. Raises `OutOfPatience`; `MemoryError` or `RuntimeError`
    when there is no memory for a thread."""
    results: list[T] = []
    errors: list[BaseException] = []
    over = threading.Lock()  # released when the thread is done
    over.acquire()
    begun = given_up = False

    def run() -> None:
        nonlocal begun
        begun = True
        if given_up:
            return
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            over.release()

    before = _own_memory()
    # `Thread.start` would wait for ever for one that runs out of memory before it begins.
    worker = _thread.start_new_thread(run, ())
    waited = 0.0
    try:
        while not over.acquire(timeout=LOOK_SECONDS):
            waited += LOOK_SECONDS
            if waited > BEGIN_SECONDS and not begun:
                raise MemoryError("a thread did not begin")
            if waited > seconds or _own_memory() - before > most_bytes:
                raise OutOfPatience
    except BaseException:  # Ctrl-C, too
        given_up = True
        while _raise_in(worker, OutOfPatience) and not over.acquire(timeout=LOOK_SECONDS):
            pass
        raise
    if errors:
        raise errors[0]
    return results[0]


def _own_memory() -> int:
    """Bytes of this process's memory that are no pages of files: a pack that is read meanwhile is
    not the program's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _raise_in(thread: int, error: type[BaseException]) -> bool:
    """Raise `error` in a thread; whether there is such a thread."""
    set_error = ctypes.pythonapi.PyThreadState_SetAsyncExc
    return bool(set_error(ctypes.c_ulong(thread), ctypes.py_object(error)))
