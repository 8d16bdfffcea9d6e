"""A kernel that fetches records from pinned host memory.

The copy engine's addresses are frozen when a CUDA graph is captured, while a kernel reads its
addresses from a table. The kernel has few blocks of threads, so that most multiprocessors are left
to the computation beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 blocks of 256 threads are said to saturate PCIe 4, so PCIe 5 gets twice as many; this is not
# measured. A full grid would take the computation's multiprocessors, too few blocks leave the port
# idle.
BLOCKS = 16
WARPS = 8
WORDS = 2048  # of 8 bytes, copied by a block at a time: four loads of 16 bytes a thread


@triton.jit(do_not_specialize_on_alignment=["experts", "loads", "addresses"])
def gather_kernel(
    experts, loads, addresses, slots, slot_words, words, k,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Copy the record of each of `experts` [k] into its slot of `loads` [k], if that is not -1."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    for cell in range(k):
        slot = tl.load(loads + cell)
        if slot >= 0:
            expert = tl.load(experts + cell)
            source = tl.load(addresses + expert).to(tl.pointer_type(tl.int64), bitcast=True)
            source = tl.multiple_of(source, 16)
            target = slots + slot.to(tl.int64) * slot_words
            for start in range(block * WORDS, words, blocks * WORDS):
                at = start + tl.arange(0, WORDS)
                value = tl.load(source + at, mask=at < words)
                tl.store(target + at, value, mask=at < words)


def gather(
    experts: Tensor, loads: Tensor, addresses: Tensor, slots: Tensor, record_bytes: int
) -> None:
    """Copy the records of `experts` [k] into the slots of `loads` [k]; -1 is no slot.

    `slots` is [n, slot_bytes] uint8. `addresses` [E] int64 are those of one layer's records, in
    memory that the device can read. The call waits for nothing.
    """
    assert record_bytes % 16 == 0
    assert slots.shape[1] % 16 == 0
    gather_kernel[(BLOCKS,)](
        experts,
        loads,
        addresses,
        slots.view(torch.int64),
        slots.shape[1] // 8,
        record_bytes // 8,
        loads.numel(),
        WORDS=WORDS,
        num_warps=WARPS,
        enable_fp_fusion=False,  # there is nothing to fuse; Triton warns when it is not told
    )
