"""The least time that bytes allow.

Knows: rates this machine was measured at, bytes over the link, bytes read on the device. Does not
know: where the bytes were counted.

Two bounds: `overlapped`, the slower of link and memory, when both work at once all the time; and
`in_turn`, their sum, when nothing is known of a layer's experts before its router was asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Part
from offload.machine.measure import measure


@dataclass(frozen=True)
class Rates:
    """GB/s of this machine."""

    link: float  # memcpy from pinned memory, in bulk
    memory: float  # device copy, bytes read and written


def rates_of(setting: Setting, part: Part) -> Rates:
    """What the link part measured; where it did not come to that, measured quickly now."""
    measured = part.of("link", "rates") or {}
    if {"h2d_pinned", "device_copy"} <= measured.keys():
        return Rates(measured["h2d_pinned"], measured["device_copy"])
    quickly = measure(setting.device)
    part.note("the link part has no rates: they were measured quickly, and are less certain")
    return Rates(quickly.link_gb_per_s, quickly.memory_gb_per_s)


@dataclass(frozen=True)
class Bound:
    """Seconds of one token or one prompt."""

    link_seconds: float
    memory_seconds: float

    @classmethod
    def of(cls, rates: Rates, link_bytes: float, device_bytes: float) -> Bound:
        return cls(link_bytes / rates.link / 1e9, device_bytes / rates.memory / 1e9)

    @property
    def overlapped(self) -> float:
        return max(self.link_seconds, self.memory_seconds)

    @property
    def in_turn(self) -> float:
        return self.link_seconds + self.memory_seconds
