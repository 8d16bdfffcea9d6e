"""Quantising without hqq, for the packs of tests on a machine that lacks it.

Knows: plain rounding between a group's extremes. Does not know: whether the result is any good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.quant.hqq import CPU, Quantized


def round_to_codes(
    weight: Tensor, bits: int, group_size: int, device: torch.device = CPU
) -> Quantized:
    """As `quant.hqq.quantize`."""
    groups = weight.cpu().float().reshape(weight.shape[0], -1, group_size)  # [N, K/g, g]
    low, high = groups.aminmax(dim=-1)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    codes = ((groups - low.unsqueeze(-1)) / step.unsqueeze(-1)).round().to(torch.uint8)
    return Quantized(codes.view(weight.shape), step, low + 2 ** (bits - 1) * step)
