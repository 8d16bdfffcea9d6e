"""What a kernel is made for and what it is told.

Knows: names. Does not know: LLVM (a model without packed weights never loads it), tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

# What a kernel is told: 64-bit words one after the other.
WORDS = (
    "x",  # [M, K]
    "weight",  # [tiles, K * bits * 8]
    "scales",  # [K/g, rows, 2], from the first tile's first row
    "steps",  # [K/g/s, rows, 4], likewise
    "out",  # [blocks * B, tiles * 64], or [K, tiles * 64] when unpacking
    "floats",  # scratch: [blocks * B, K], x in float32
    "sums",  # scratch: [blocks * B, K/g], x summed over each group
    "tokens",  # M
    "blocks",
    "tiles",
    "rows",
    "groups",
    "group_size",
    "shared",  # s: groups that share a step
    "threads",
)


@dataclass(frozen=True)
class Kernel:
    """What a kernel is compiled for. Sizes are told when it runs."""

    bits: int
    scale_bits: int
    bfloat16: bool  # tokens and results; else float32
    tokens: int  # B, 1 to 4; 0 is the kernel that unpacks the matrix, transposed
