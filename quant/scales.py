"""Scales and offsets that are quantised themselves, 8 bits each.

Knows: how pairs [K/g, N, 2] become bytes and steps, and back. Does not know: weights.

With 16 weights a group, two bfloat16 values a group double the size of 2-bit weights; as bytes they
add one bit a weight (mixtral-offloading's preset, after HQQ's `quant_scale` and `quant_zero`). Up
to `MOST_SHARED` groups of one row share a step and a base: `value = byte * step + base`. The four
bfloat16 values of a row's span are `(step, base)` of the scales, then of the offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_SHARED = 256  # groups, as in mixtral-offloading
STEP_VALUES = 4


def shared_steps(groups: int) -> int:
    """How many of a row's `groups` share a step: the largest divisor not above `MOST_SHARED`."""
    return next(n for n in range(min(groups, MOST_SHARED), 0, -1) if groups % n == 0)


def encode_scales(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs [K/g, N, 2] float32 as bytes [K/g, N, 2] uint8 and steps [K/g/s, N, 4] bfloat16."""
    groups, rows, _ = pairs.shape
    spans = pairs.reshape(-1, shared_steps(groups), rows, 2)  # [K/g/s, s, N, 2]
    low, high = spans.aminmax(dim=1)  # [K/g/s, N, 2] each
    steps = torch.stack(((high - low) / 255, low), dim=-1).to(torch.bfloat16)  # as they are stored
    step, base = steps.float().unsqueeze(1).unbind(-1)
    codes = ((spans - base) / step.clamp(min=1e-30)).round_().clamp_(0, 255)
    return codes.to(torch.uint8).view(groups, rows, 2), steps.flatten(2)


def decode_scales(codes: Tensor, steps: Tensor) -> Tensor:
    """Inverse of `encode_scales`: pairs [K/g, N, 2] float32."""
    groups, rows, _ = codes.shape
    step, base = steps.float().view(-1, 1, rows, 2, 2).unbind(-1)  # [K/g/s, 1, N, 2] each
    spans = codes.view(step.shape[0], -1, rows, 2)
    return (spans.float() * step + base).view(groups, rows, 2)
