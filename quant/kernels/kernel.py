"""What a CPU kernel is compiled for, and the words it is called with; neither needs LLVM.

Letters: M tokens, B tokens of a block, K columns, g columns of a group, s groups that share a step.
"""

from __future__ import annotations

from dataclasses import dataclass

# A kernel's only argument points at these 64-bit words, in this order.
WORDS = (
    "x",  # [M, K]
    "weight",  # [tiles, K * bits * 8]
    "scales",  # [K/g, rows, 2], from the first row of the first tile on
    "steps",  # [K/g/s, rows, 4], from the same row on
    "out",  # [blocks * B, tiles * 64], or [K, tiles * 64] when unpacking
    "floats",  # scratch [blocks * B, K]: x in float32
    "sums",  # scratch [blocks * B, K/g]: x summed over each group
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
    """What a kernel is compiled for; the kernel learns sizes when it is called."""

    bits: int
    scale_bits: int
    bfloat16: bool  # dtype of tokens and results; else float32
    tokens: int  # B, 1 to 4; 0 for the kernel that dequantises the matrix, transposed
