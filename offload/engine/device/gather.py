"""Fetching records from pinned host memory by a kernel.

Knows: addresses, slots, how many blocks of threads the link needs. Does not know: who decided.

A copy of the copy engine has its addresses frozen when a graph is captured; a kernel reads them
from a table. It is a few blocks, so that the multiprocessors stay with the compute beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 blocks of 256 threads are said to saturate PCIe 4; twice that for PCIe 5. Not measured here: a
# full grid takes the compute's multiprocessors, too few leave the link idle.
BLOCKS = 16
WARPS = 8
WORDS = 2048  # of 8 bytes, a block at a time: four loads of 16 bytes a thread are under way


@triton.jit(do_not_specialize_on_alignment=["experts", "loads", "addresses"])
def gather_kernel(
    experts, loads, addresses, slots, slot_words, words, k,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Copy the record of each of `experts` [k] into the slot that `loads` [k] says, -1: not."""
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
    """Copy records into `slots` [n, slot_bytes] uint8; `addresses` [E] int64 of one layer, in
    memory the device can read. Waits for nothing."""
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
