"""Reading at a place of an open file, by several threads at once.

Knows: that a read may be short, and what there is on Windows. Does not know: what files hold.
"""

from __future__ import annotations

import os
import threading

_SEEKING = threading.Lock()


def read_at(file: int, begin: int, into: memoryview) -> int:
    """Read from byte `begin` on into `into` until it is full or the file ends; bytes that were
    read. Raises `OSError`."""
    done = 0
    while done < len(into):
        count = _read_some(file, begin + done, into[done:])
        if not count:
            break
        done += count
    return done


def _read_some(file: int, begin: int, into: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], begin)
    with _SEEKING:  # a file has one place only: one thread at a time
        os.lseek(file, begin, os.SEEK_SET)
        data = os.read(file, len(into))
    into[: len(data)] = data
    return len(data)
