"""The gather kernel's rate over the link, beside memcpy's.

Knows: how the device-planned engine's gather is called. Does not know: who calls it when.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cuda_check.attempt import NotBuiltError
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Row

PROGRAMS = (4, 8, 16, 32)
TARGET = 0.90  # of memcpy


def gather_rates(setting: Setting, memcpy_gb_per_s: float | None) -> Iterator[Row]:
    """A row for each number of programs. Raises `NotBuiltError`."""
    raise NotBuiltError("offload.device has no gather")
    yield {}
