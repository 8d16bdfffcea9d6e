"""Pieces that the GPU's kernels share: codes, scales, biases and activations, in registers.

Triton's interpreter truncates to bfloat16 where a GPU rounds, and multiplies bfloat16 numbers as if
they were integers; code behind `INTERPRETED` makes up for that. Every function has one `return`, at
its end, because Triton compiles code behind an earlier one even if constants make it unreachable.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MANTISSA = tl.constexpr(23)  # bits of a float32
MAGIC = tl.constexpr(0x4B000000)  # the float 2**23; OR-ing bits into its low end adds them to it


@triton.jit
def rounded(x: tensor, DTYPE: tl.constexpr) -> Any:
    """The float32 `x`, rounded to DTYPE but still stored as float32."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        out = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        out = x.to(DTYPE).to(tl.float32)
    return out


@triton.jit
def centred(
    words: tensor, magic: tensor, CENTRE: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr
) -> Any:
    """(code - CENTRE) / `code_weight` for the codes at bit AT of 32-bit `words`, as float32.

    OR-ing a code into `magic` makes a float of it, and one subtraction removes the excess. This
    avoids conversions, which GPUs do at a quarter of the rate of other operations.
    """
    PLACE: tl.constexpr = AT if AT + WIDTH <= MANTISSA else AT - 16
    shifted = words >> (AT - PLACE)
    bits = (shifted & ((2**WIDTH - 1) << PLACE)) | magic
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + CENTRE * 2.0**PLACE)


@triton.jit
def code_weight(AT: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """The factor that `centred` leaves out of its codes."""
    return 1.0 / 2.0 ** (AT if AT + WIDTH <= MANTISSA else AT - 16)


@triton.jit
def pair_halves(pairs: tensor) -> Any:
    """(scale, offset) as float32 from bfloat16 pairs in 32-bit words."""
    scale = (pairs << 16).to(tl.float32, bitcast=True)
    offset = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    return scale, offset


@triton.jit
def scale_pairs(
    record: tensor,
    scale_at: tensor,
    step_at: tensor,
    group: tensor,
    row: tensor,
    stored_rows: tensor,
    live: tensor,
    SCALE_BITS: tl.constexpr,
    SHARED: tl.constexpr,
) -> Any:
    """(scale, offset) of `group` and `row`, which broadcast to one shape; 0 where not `live`."""
    place = group * stored_rows + row
    if SCALE_BITS == 16:
        words = (record + scale_at).to(tl.pointer_type(tl.uint32))
        scale, offset = pair_halves(tl.load(words + place, mask=live, other=0))
    else:
        codes = (record + scale_at).to(tl.pointer_type(tl.uint16))
        code = tl.load(codes + place, mask=live, other=0)
        steps = (record + step_at).to(tl.pointer_type(tl.uint32))
        span = ((group // SHARED) * stored_rows + row) * 2
        step, base = pair_halves(tl.load(steps + span, mask=live, other=0))
        scale = (code & 0xFF).to(tl.float32) * step + base
        step, base = pair_halves(tl.load(steps + span + 1, mask=live, other=0))
        offset = (code >> 8).to(tl.float32) * step + base
    return scale, offset


@triton.jit
def sigmoid(x: tensor) -> Any:
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(
    gate: tensor,
    up: tensor,
    limit: tensor,
    alpha: tensor,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    DTYPE: tl.constexpr,
) -> Any:
    """What `quant.program.Gate` gives for float32 values, rounded to DTYPE where torch rounds."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if GATE == "swiglu_oai":
        share = rounded(sigmoid(rounded(gate * alpha, DTYPE)), DTYPE)
        out = rounded(up + 1.0, DTYPE) * rounded(gate * share, DTYPE)
    elif GATE == "silu":
        out = gate * sigmoid(gate)
    elif GATE == "gelu":
        out = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif GATE == "gelu_tanh":
        cube = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        out = gate * sigmoid(2.0 * cube)  # 0.5 * (1 + tanh(y)) = sigmoid(2 * y)
    elif GATE == "relu":
        out = tl.maximum(gate, 0.0)
    else:
        tl.static_assert(GATE == "relu2")
        positive = tl.maximum(gate, 0.0)
        out = positive * positive
    if GATED and GATE != "swiglu_oai":
        out = rounded(out, DTYPE) * up
    return rounded(out, DTYPE)


@triton.jit
def load_inputs(
    x: tensor,
    k: tensor,
    live: tensor,
    limit: tensor,
    alpha: tensor,
    K: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMPED: tl.constexpr,
    DTYPE: tl.constexpr,
) -> Any:
    """The inputs number `k` of the row at `x` as float32, after the activation GATE if given."""
    if GATED:
        first = 2 * k if INTERLEAVED else k
        second = first + 1 if INTERLEAVED else K + k
        gate = tl.load(x + first, mask=live, other=0.0).to(tl.float32)
        up = tl.load(x + second, mask=live, other=0.0).to(tl.float32)
        out = activated(gate, up, limit, alpha, GATE, GATED, CLAMPED, DTYPE)
    else:
        out = tl.load(x + k, mask=live, other=0.0).to(tl.float32)
        if GATE != "none":
            out = activated(out, out, limit, alpha, GATE, GATED, CLAMPED, DTYPE)
    return out


@triton.jit
def with_bias(
    total: tensor,
    record: tensor,
    bias_at: tensor,
    row: tensor,
    live: tensor,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> Any:
    """`total`, plus the bias of `row` if there is one (BIAS is its dtype), rounded to DTYPE."""
    if BIAS is not None:
        biases = (record + bias_at).to(tl.pointer_type(BIAS))
        total += rounded(tl.load(biases + row, mask=live, other=0.0).to(tl.float32), DTYPE)
    return rounded(total, DTYPE)
