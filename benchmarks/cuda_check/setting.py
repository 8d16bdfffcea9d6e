"""What one part of the check is told.

Knows: the numbers that differ between a measurement and a rehearsal. Does not know: parts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Setting:
    """How much is done, and until when. A rehearsal runs everything on the CPU with tiny shapes."""

    rehearse: bool
    work: Path  # a folder for packs, emptied by the one who gave it
    seconds: float  # this part may take
    pack_bytes: int  # the most of one model's experts
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def seconds_left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def pick(self, measured: int, rehearsed: int) -> int:
        """A number of bytes, tokens or rounds."""
        return rehearsed if self.rehearse else measured
