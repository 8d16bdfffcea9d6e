"""The processes that a test has started."""

from __future__ import annotations

import psutil


def children() -> list[psutil.Process]:
    """Of this process, but for the one that multiprocessing keeps once it has started any."""
    here = psutil.Process().children(recursive=True)
    return [child for child in here if not _is_tracker(child)]


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:  # it has ended
        return False
