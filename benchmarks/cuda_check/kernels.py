"""Kernels that multiply straight from records, beside the device's copy bandwidth.

Knows: shapes, bits, how `quant.experts` is called. Does not know: engines, caches.
"""

from __future__ import annotations

from benchmarks.cuda_check.attempt import NotBuiltError, attempt
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Part

TARGET = 0.70  # of device copy bandwidth, decode at Mixtral's shape


def run(setting: Setting, part: Part) -> None:
    """Decode products at one to four tokens, prefill products, at every number of bits."""
    with attempt(part, "grouped kernels"):
        raise NotBuiltError("quant.experts")
