"""Multiplying by a matrix that lies in a record.

Knows: the reference (dequantise, then `linear`) on any device, which kernels are quicker for how
many tokens, and whether they can be trusted on this machine. Does not know: experts, layers, slots.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from offload.quant.codes import TILE_ROWS, decode_scales, encode_scales, unpack, unpack_rows
from offload.quant.gpu import gpu_kernels, launching_on
from offload.quant.kernels import cpu
from offload.quant.record import (
    MatrixSpec,
    MatrixView,
    RecordLayout,
    plan_layout,
    view_record,
    view_rows,
)
from offload.quant.scheme import Scheme
from torch import Tensor
from torch.nn.functional import linear, pad

Matmul = Callable[[Tensor, MatrixView], Tensor]

logger = logging.getLogger(__name__)

# M tokens, K inputs, N outputs, g group size

# Above this many tokens unpacking once and multiplying densely wins, and what is unpacked at a time
# stays in the caches: both measured in docs/log.md. Neither follows a stopwatch: paths round
# differently, and logits must not depend on what else the machine was doing.
MOST_PACKED_TOKENS = 24
SLAB_WEIGHTS = 2**22
REFERENCE_WEIGHTS = 2**26  # dequantised at a time by the reference: a head can have 600 M
# On a GPU each token reads the matrix for itself up to so many, then blocks of tokens do.
MOST_GEMV_TOKENS, GPU_BLOCK = 4, 64
# oneDNN compiles a kernel for every number of tokens that it has not met: 2 ms, where multiplying
# takes 0.3. An expert's tokens are as many as chose it, so bfloat16 has multiples of this.
FEW_SHAPES = 32
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize(view: MatrixView, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that `view` stands for, in `dtype`."""
    if view.scales is None:
        return view.weight.to(dtype)
    layout = view.layout
    rows, groups = layout.stored_rows, layout.groups
    codes = unpack(view.weight, layout.bits).view(rows, groups, layout.group_size)  # [N, K/g, g]
    pairs = view.scales.float() if view.steps is None else decode_scales(view.scales, view.steps)
    scale, offset = pairs.permute(2, 1, 0).unsqueeze(-1)  # [N, K/g, 1] each
    centred = codes.to(torch.float32).sub_(2 ** (layout.bits - 1))
    weight = centred.mul_(scale).add_(offset).to(dtype)
    return weight.view(rows, layout.columns)[: layout.rows]


def take_rows(view: MatrixView, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [T, K] of the quantised matrix, numbered by `rows` [T], in `dtype`."""
    assert view.scales is not None
    layout = view.layout
    codes = unpack_rows(view.weight, layout.bits, rows).float()  # [T, K]
    scales = view.scales[:, rows]  # [K/g, T, 2]
    pairs = scales.float() if view.steps is None else decode_scales(scales, view.steps[:, rows])
    scale, offset = pairs.transpose(0, 1).unsqueeze(2).unbind(-1)  # [T, K/g, 1] each
    centred = codes.view(len(rows), -1, layout.group_size) - 2 ** (layout.bits - 1)
    return torch.addcmul(offset, centred, scale).reshape(len(rows), -1).to(dtype)


def matmul_reference(x: Tensor, view: MatrixView) -> Tensor:
    """`x` [M, K] times the transposed matrix, plus its bias: [M, N] in x's dtype, on any device."""
    bias = None if view.bias is None else view.bias.to(x.dtype)
    step = max(1, REFERENCE_WEIGHTS // (TILE_ROWS * view.layout.columns)) * TILE_ROWS
    if view.scales is None or step >= view.layout.rows:
        return linear(x, dequantize(view, x.dtype), bias)
    parts = [
        linear(x, dequantize(view_rows(view, start, start + step), x.dtype))
        for start in range(0, view.layout.rows, step)
    ]
    out = torch.cat(parts, dim=1)
    return out if bias is None else out.add_(bias)


def matmul_packed(x: Tensor, view: MatrixView) -> Tensor:
    """As `matmul_reference` on the CPU, without unpacking the matrix first: for few tokens."""
    if x.dtype == torch.float16:
        return matmul_packed(x.float(), view).to(x.dtype)
    out = cpu.multiply(x, view)
    return out if view.bias is None else out.add_(view.bias)


def matmul_unpacked(x: Tensor, view: MatrixView) -> Tensor:
    """As `matmul_reference` on the CPU, a slab of rows after the other: for many tokens."""
    layout = view.layout
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not bfloat16_is_quick()):
        return matmul_unpacked(x.float(), view).to(x.dtype)
    out = x.new_empty(x.shape[0], layout.rows)
    step = max(1, SLAB_WEIGHTS // (TILE_ROWS * layout.columns)) * TILE_ROWS
    for start in range(0, layout.rows, step):
        cells = out[:, start : start + step]
        weight = cpu.unpack(view, x.dtype, start, min(start + step, layout.stored_rows))
        torch.mm(x, weight[:, : cells.shape[1]], out=cells)
    return out if view.bias is None else out.add_(view.bias)


def matmul_gpu(x: Tensor, view: MatrixView) -> Tensor:
    """As `matmul_reference` on a GPU, from a whole record: the matrix is the only "expert"."""
    gpu = gpu_kernels(x.device)
    assert gpu is not None
    count, layout = len(x), view.layout
    x, slots = x.contiguous(), _record_of(view)
    out = x.new_empty(count, layout.rows)
    if count <= MOST_GEMV_TOKENS:
        with launching_on(x.device):
            gpu.gemv(x, slots, _zeros(x.device)[:count], layout, out, tokens=count)
        return out
    cells = torch.arange(count + GPU_BLOCK, dtype=torch.int32, device=x.device)
    first = cells[:count:GPU_BLOCK]
    blocks = torch.stack((first * 0, first, (first + GPU_BLOCK).clamp(max=count)), dim=1)
    with launching_on(x.device):
        gpu.gemm(x, slots, blocks, cells, GPU_BLOCK, layout, out)
    return out


def _record_of(view: MatrixView) -> Tensor:
    """The bytes [1, ..] that `view` is part of, from its record's begin on."""
    weight = view.weight
    begin = weight.storage_offset() * weight.itemsize - view.layout.weight_offset
    size = weight.untyped_storage().nbytes() - begin
    flat = torch.empty(0, dtype=torch.uint8, device=weight.device)
    return flat.set_(weight.untyped_storage(), begin, (1, size), (size, 1))


@functools.cache
def _zeros(device: torch.device) -> Tensor:
    """The slot of each token; made before a graph is captured, when kernels are tried."""
    return torch.zeros(MOST_GEMV_TOKENS, dtype=torch.int32, device=device)


def matmul(x: Tensor, view: MatrixView) -> Tensor:
    """`x` [M, K] times the matrix in `view`: [M, N], by the fastest way this machine has."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) > MOST_PACKED_TOKENS:
        return _matmul(pad(x, (0, 0, 0, -len(x) % FEW_SHAPES)), view)[: len(x)]
    return _matmul(x, view)


def _matmul(x: Tensor, view: MatrixView) -> Tensor:
    asked = x.device.type in ("cpu", "cuda") and x.dtype in KERNEL_DTYPES and len(x) > 0
    if view.scales is None or not asked or x.requires_grad:  # kernels know no gradients
        return matmul_reference(x, view)
    if x.device.type == "cuda":
        layout = view.layout
        scheme = Scheme(layout.bits, layout.group_size, layout.scale_bits)
        if gpu_kernel_works(scheme, x.dtype, x.device):
            return matmul_gpu(x, view)
        return matmul_reference(x, view)
    way = matmul_packed if len(x) <= MOST_PACKED_TOKENS else matmul_unpacked
    if cpu_kernel_works(way, view.layout.bits, view.layout.scale_bits, x.dtype):
        return way(x, view)
    return matmul_reference(x, view)


@functools.cache
def bfloat16_is_quick() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices here: without AVX-512 torch can be 40 to 500
    times slower at it than at float32 (pytorch #146508)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def cpu_kernel_works(way: Matmul, bits: int, scale_bits: int, dtype: torch.dtype) -> bool:
    """Whether `way`'s kernels compile here and small products are what the reference says: of each
    number of tokens that has a kernel of its own, by one thread and by all."""
    random = torch.Generator().manual_seed(1)
    for rows, columns, tokens in ((128, 64, 1), (256, 256, 2), (256, 256, 3), (256, 256, 8)):
        view = sample_matrix(rows, columns, Scheme(bits, 32, scale_bits))
        x = torch.randn(tokens, columns, generator=random, dtype=torch.float32).to(dtype)
        try:
            quick = way(x, view).float()
        except (ImportError, OSError, RuntimeError) as error:
            logger.warning("no CPU kernel for %d bits, products will be slow: %s", bits, error)
            return False
        if not _agrees(quick, matmul_reference(x.float(), view)):
            logger.warning("the CPU kernel for %d bits is wrong here, products will be slow", bits)
            return False
    return True


def _agrees(quick: Tensor, exact: Tensor) -> bool:
    """Whether two ways differ by no more than rounding, in half precision, explains."""
    return torch.allclose(quick, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@functools.cache
def gpu_kernel_works(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU's kernels compile here and give what the reference gives."""
    if gpu_kernels(device) is None:
        return False
    layout = plan_layout((MatrixSpec("sample", 200, 512, True, torch.bfloat16),), scheme)
    view = view_record(sample_record(layout).to(device), layout)["sample"]
    random = torch.Generator().manual_seed(1)
    for tokens in (1, MOST_GEMV_TOKENS + 1):
        x = torch.randn(tokens, 512, generator=random, dtype=torch.float32).to(device, dtype)
        try:
            quick = matmul_gpu(x, view).float()
        except Exception as error:  # whatever a compiler or a driver raises
            logger.warning("no GPU kernel for %s, products will be slow: %s", scheme, error)
            return False
        if not _agrees(quick, matmul_reference(x.float(), view)):
            logger.warning("the GPU kernel for %s is wrong here, products will be slow", scheme)
            return False
    return True


def sample_matrix(
    rows: int, columns: int, scheme: Scheme, *, bias: bool = False, seed: int = 0
) -> MatrixView:
    """A matrix of random codes, to probe and to measure with."""
    layout = plan_layout((MatrixSpec("sample", rows, columns, bias, torch.bfloat16),), scheme)
    return view_record(sample_record(layout, seed), layout)["sample"]


def sample_record(layout: RecordLayout, seed: int = 0) -> Tensor:
    """A record of random codes with small scales, to probe and to measure with."""
    random = torch.Generator().manual_seed(seed)  # equal rows would hide a wrong order of them
    record = torch.randint(0, 256, (layout.record_bytes,), generator=random, dtype=torch.uint8)
    for view in view_record(record, layout).values():
        if view.scales is None:
            view.weight.normal_(generator=random).mul_(0.02)
        else:
            pairs = torch.rand(view.scales.shape, generator=random, dtype=torch.float32)
            pairs.mul_(0.02).sub_(0.01)
            if view.steps is None:
                view.scales.copy_(pairs)
            else:
                for place, encoded in zip(
                    (view.scales, view.steps), encode_scales(pairs), strict=True
                ):
                    place.copy_(encoded)
        if view.bias is not None:
            view.bias.normal_(generator=random)
    return record
