"""Half-Quadratic Quantization of one matrix, by hqq's own solver.

Knows: how hqq is called so that it is fast on a CPU, and the affine form everything else uses:
`w ~ (code - 2**(bits-1)) * scale + offset`. Does not know: how codes are packed (`quant.packing`).
Source: https://github.com/dropbox/hqq, `Quantizer.quantize`, axis=1 (groups run along a row).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

# hqq's solver touches the whole matrix twenty times: blocks that stay in cache are ten times
# faster. It stops early by a block's mean error, so the size is part of the result; below 32768
# values torch sums in one thread, and the result does not depend on the number of threads.
BLOCK_WEIGHTS = 32000
CPU = torch.device("cpu")
SMALLEST_STEP = 5e-5  # between codes; hqq takes no smaller one, and below a range of 1e-4 takes 1


class Quantized(NamedTuple):
    """[N, K] as integers: `w ~ (codes - 2**(bits-1)) * scale + offset`."""

    codes: Tensor  # [N, K] uint8
    scale: Tensor  # [N, K/g] float32
    offset: Tensor  # [N, K/g] float32


@functools.cache
def _solver() -> Any:
    """hqq's own, loaded when first asked for: a pack that is there is run without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing hqq emits 14 deprecation warnings of torch's
        from hqq.core.quantize import Quantizer
    return Quantizer.quantize


def quantize(weight: Tensor, bits: int, group_size: int, device: torch.device = CPU) -> Quantized:
    """Quantise `weight` [N, K] to `bits` with one scale and one offset for each `group_size`
    columns, on `device`; a GPU takes all rows at once. The result is on the CPU.

    Raises `ValueError` when `group_size` does not divide K.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {columns} columns")
    block = max(1, BLOCK_WEIGHTS // columns) if device.type == "cpu" else rows
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(rows, columns // group_size, dtype=torch.float32)
    offset = torch.empty_like(scale)
    middle = 2 ** (bits - 1)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        solved, meta = _solver()(
            weight[part].to(device).float(),
            nbits=bits,
            group_size=group_size,
            axis=1,
            bitpack=False,
            compute_dtype=torch.float32,
            device=str(device),
        )
        part_scale = meta["scale"].view(-1, columns // group_size)
        codes[part] = solved.view(-1, columns).to(torch.uint8)
        scale[part] = part_scale
        # hqq: w = (code - zero) * scale
        offset[part] = (middle - meta["zero"].view_as(part_scale)) * part_scale
    _quantize_flat_groups(weight.reshape(rows, -1, group_size), bits, codes, scale, offset)
    return Quantized(codes, scale, offset)


def _quantize_flat_groups(
    groups: Tensor, bits: int, codes: Tensor, scale: Tensor, offset: Tensor
) -> None:
    """Where a group [N, K/g, g] needs finer steps than hqq takes: plain rounding between its
    extremes."""
    low, high = groups.float().aminmax(dim=-1)
    flat = high - low <= SMALLEST_STEP * (2**bits - 1)
    if not flat.any():
        return
    low, step = low[flat], (high - low)[flat] / (2**bits - 1)
    values = (groups[flat].float() - low.unsqueeze(-1)) / step.clamp(min=1e-30).unsqueeze(-1)
    codes.view(groups.shape)[flat] = values.round().to(torch.uint8)
    scale[flat] = step
    offset[flat] = low + 2 ** (bits - 1) * step
