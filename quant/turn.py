"""Taking turns: of processes that make the same thing on disk one makes it, the others wait.

Knows: the lock file, and that waiting is told. Does not know: what is made.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger("offload")


def take_turn(file: Path, what: str) -> FileLock:
    """The lock `file`, taken; use it as a context manager or `release` it. Waits for who has it.

    Raises `OSError` where the file cannot be made: filelock takes some of these for a lock that
    another process has, and would wait for ever.
    """
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s: waiting for it", what)
        lock.acquire()
    return lock
