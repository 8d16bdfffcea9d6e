"""How a matrix's weights are stored, as three numbers and as text."""

from __future__ import annotations

import re
from dataclasses import dataclass

BITS = (2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (16, 32, 64, 128, 256)
SMALLEST_GROUP = GROUP_SIZES[0]
SCALE_BITS = (8, 16)


@dataclass(frozen=True)
class Scheme:
    """Weights of `bits` bits; `group_size` weights of a row share a scale and an offset.

    Scale and offset take `scale_bits` bits each. With 16 `bits`, weights stay as the checkpoint
    stores them. A scheme is written like `4`, `4g64` or `2g16s8`. Raises `ValueError` on numbers
    that no kernel supports.
    """

    bits: int
    group_size: int = 64
    scale_bits: int = 16

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, BITS),
            ("group size", self.group_size, GROUP_SIZES),
            ("bits of a scale", self.scale_bits, SCALE_BITS),
        ):
            if value not in known:
                choices = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
                raise ValueError(f"{name} must be {choices}, not {value}")

    @property
    def quantised(self) -> bool:
        return self.bits < 16

    def __str__(self) -> str:
        if not self.quantised:
            return "16"
        return f"{self.bits}g{self.group_size}" + ("s8" if self.scale_bits == 8 else "")

    @classmethod
    def parse(cls, text: str, group_size: int = 64) -> Scheme:
        """The scheme called `text`, with `group_size` if `text` has none. Raises `ValueError`."""
        match = re.fullmatch(r"(\d{1,4})(?:g(\d{1,4}))?(?:s(\d{1,4}))?", text)
        if match is None:
            raise ValueError(f"{text!r} is not a number of bits: write one like 4 or 2g16s8")
        bits, group, scale_bits = match.groups()
        if int(bits) == 16:
            if group or scale_bits:
                raise ValueError(
                    "16 bits means weights as stored: leave group size and scale bits out"
                )
            return cls(16)
        return cls(int(bits), int(group or group_size), int(scale_bits or 16))
