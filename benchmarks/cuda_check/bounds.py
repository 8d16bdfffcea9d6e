"""The least time that bytes allow.

Knows: rates this machine was measured at, bytes over the link, bytes read on the device. Does not
know: where the bytes were counted.

Two bounds: `overlapped`, the slower of link and memory, when both work at once all the time; and
`in_turn`, their sum, when nothing is known of a layer's experts before its router was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.cuda_check.attempt import NotBuiltError


@dataclass(frozen=True)
class Rates:
    """GB/s of this machine."""

    link: float  # memcpy from pinned memory, in bulk
    memory: float  # device copy, bytes read and written

    @classmethod
    def of(cls, measured: Mapping[str, float]) -> Rates:
        """From the link part's rates."""
        try:
            return cls(measured["h2d_pinned"], measured["device_copy"])
        except KeyError as error:
            raise NotBuiltError(f"no bound without the link part's {error}") from None


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
