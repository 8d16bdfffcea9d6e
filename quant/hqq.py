"""Half-Quadratic Quantization of one matrix, by hqq's own solver.

Knows: how hqq is called so that it is fast on a CPU, and the affine form everything else uses:
`w ~ (code - 2**(bits-1)) * scale + offset`. Does not know: how codes are packed (`quant.packing`).
Source: https://github.com/dropbox/hqq, `Quantizer.quantize`, axis=1 (groups run along a row).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing hqq emits 14 deprecation warnings of torch's
    from hqq.core.quantize import Quantizer

# hqq's solver touches the whole matrix twenty times, so blocks that stay in cache are ten times
# faster. It stops early block by block: the size is part of the result, not for tuning by machine.
BLOCK_WEIGHTS = 65536


class Quantized(NamedTuple):
    """[N, K] as integers: `w ~ (codes - 2**(bits-1)) * scale + offset`."""

    codes: Tensor  # [N, K] uint8
    scale: Tensor  # [N, K/g] float32
    offset: Tensor  # [N, K/g] float32


def quantize(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """Quantise `weight` [N, K] to `bits` with one scale and one offset for each `group_size`
    columns.

    Raises `ValueError` when `group_size` does not divide K.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {columns} columns")
    block = max(1, BLOCK_WEIGHTS // columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(rows, columns // group_size)
    offset = torch.empty(rows, columns // group_size)
    middle = 2 ** (bits - 1)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        solved, meta = Quantizer.quantize(
            weight[part].float(),
            nbits=bits,
            group_size=group_size,
            axis=1,
            bitpack=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        part_scale = meta["scale"].view(-1, columns // group_size)
        codes[part] = solved.view(-1, columns).to(torch.uint8)
        scale[part] = part_scale
        # hqq: w = (code - zero) * scale
        offset[part] = (middle - meta["zero"].view_as(part_scale)) * part_scale
    return Quantized(codes, scale, offset)
