"""Quantises a matrix by Half-Quadratic Quantization, with hqq's solver called to suit CPU caches.

The rest of the project uses the affine form `w ~ (code - 2**(bits-1)) * scale + offset`.
Source: https://github.com/dropbox/hqq, `Quantizer.quantize`, axis=1 (groups run along a row).

Letters: N rows, K columns, g columns of a group.
"""

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

# hqq's solver passes over its input twenty times, so blocks that stay in the caches are ten times
# faster. A block's mean error tells the solver when to stop, so the block size affects the result.
# Below 32768 values torch sums in one thread, so the number of threads does not affect the result.
BLOCK_WEIGHTS = 32000
CPU = torch.device("cpu")
# hqq's smallest step between codes; for groups with a range below 1e-4, hqq uses a step of 1.
SMALLEST_STEP = 5e-5


class Quantized(NamedTuple):
    """A matrix [N, K] as integers: `w ~ (codes - 2**(bits-1)) * scale + offset`."""

    codes: Tensor  # [N, K] uint8
    scale: Tensor  # [N, K/g] float32
    offset: Tensor  # [N, K/g] float32


@functools.cache
def _solver() -> Any:
    """hqq's solver, imported on first use because running a finished pack does not need it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing hqq causes 14 deprecation warnings of torch
        from hqq.core.quantize import Quantizer
    return Quantizer.quantize


def quantize(weight: Tensor, bits: int, group_size: int, device: torch.device = CPU) -> Quantized:
    """Quantise `weight` [N, K] to `bits`, with a scale and an offset for each `group_size` columns.

    The solver runs on `device`; a GPU takes all rows at once. The result is on the CPU.
    Raises `ValueError` if `group_size` does not divide K.
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
            weight[part].to(device).float().contiguous(),  # a sum depends on the order of strides
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
        # hqq's form is w = (code - zero) * scale.
        offset[part] = (middle - meta["zero"].view_as(part_scale)) * part_scale
    _quantize_flat_groups(weight.reshape(rows, -1, group_size), bits, codes, scale, offset)
    return Quantized(codes, scale, offset)


def _quantize_flat_groups(
    groups: Tensor, bits: int, codes: Tensor, scale: Tensor, offset: Tensor
) -> None:
    """Encode those groups of `groups` [N, K/g, g] anew that need finer steps than hqq can take.

    A group's weights are rounded to equal steps between its smallest and its largest weight.
    """
    low, high = groups.float().aminmax(dim=-1)
    flat = high - low <= SMALLEST_STEP * (2**bits - 1)
    if not flat.any():
        return
    low, step = low[flat], (high - low)[flat] / (2**bits - 1)
    values = (groups[flat].float() - low.unsqueeze(-1)) / step.clamp(min=1e-30).unsqueeze(-1)
    codes.view(groups.shape)[flat] = values.round().to(torch.uint8)
    scale[flat] = step
    offset[flat] = low + 2 ** (bits - 1) * step
