"""Multiplies by a matrix that lies in a record.

The reference dequantises and calls `linear`, on any device. Kernels are used where they compile and
agree with the reference, for those numbers of tokens for which they are quicker.

Letters: M tokens, N outputs (rows of the matrix), K inputs (its columns), g columns of a group,
T rows asked for.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from offload.quant.codes import TILE_ROWS, decode_scales, encode_scales, unpack, unpack_rows
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

Matmul = Callable[[Tensor, MatrixView], Tensor]

logger = logging.getLogger(__name__)

# With more than MOST_PACKED_TOKENS, unpacking once and multiplying densely is quicker. Slabs of
# SLAB_WEIGHTS weights stay in the caches. Both were measured once (docs/log/cpu-kernels.md) and are
# not timed at run time: the two ways round differently, and logits must not depend on how busy the
# machine is.
MOST_PACKED_TOKENS = 24
SLAB_WEIGHTS = 2**22
REFERENCE_WEIGHTS = 2**26  # the most that the reference dequantises at once; a head can have 600 M
# On a GPU, up to MOST_GEMV_TOKENS tokens each read the matrix for themselves. More tokens share
# reads in blocks of GPU_BLOCK.
MOST_GEMV_TOKENS, GPU_BLOCK = 4, 64
# oneDNN compiles a kernel for each new number of tokens, which takes 2 ms where multiplying takes
# 0.3 ms. Any number of tokens can choose an expert, so in bfloat16 that number is rounded up to a
# multiple of FEW_SHAPES.
FEW_SHAPES = 32
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_CAPABILITY = (7, 5)  # the lowest compute capability that kernels are made for


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which kernels are launched on `device`.

    Triton launches on the thread's current device, wherever the tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def gpu_kernels(device: torch.device) -> ModuleType | None:
    """`quant.kernels.gpu` if it can run on `device`, else None; on CUDA a warning says why.

    On the CPU the module runs only in tests that set TRITON_INTERPRET=1 before Triton is imported.
    """
    if device.type != "cuda":
        if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
            return None
    elif torch.cuda.get_device_capability(device) < SMALLEST_CAPABILITY:
        logger.warning(
            "products will be slow: there are no kernels for GPUs below compute capability 7.5"
        )
        return None
    try:
        import offload.quant.kernels.gpu as kernels
    except ImportError as error:
        logger.warning("products will be slow, without GPU kernels (%s): install triton", error)
        return None
    return kernels


def dequantize(view: MatrixView, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in `view`, in `dtype`."""
    if view.scales is None:
        return view.weight.to(dtype)
    layout = view.layout
    codes = unpack(view.weight, layout.bits).view(
        -1, layout.groups, layout.group_size
    )  # [N, K/g, g]
    pairs = view.scales.float() if view.steps is None else decode_scales(view.scales, view.steps)
    scale, offset = pairs.permute(2, 1, 0).unsqueeze(-1)  # [N, K/g, 1] each
    centred = codes.to(torch.float32).sub_(2 ** (layout.bits - 1))
    weight = centred.mul_(scale).add_(offset).to(dtype).view(-1, layout.columns)
    return weight[: layout.rows]


def take_rows(view: MatrixView, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [T, K] of a quantised matrix whose numbers are in `rows` [T], in `dtype`."""
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
    """Do what `matmul_reference` does, for few tokens on the CPU, directly from packed weights."""
    if x.dtype == torch.float16:
        return matmul_packed(x.float(), view).to(x.dtype)
    out = cpu.multiply(x, view)
    return out if view.bias is None else out.add_(view.bias)


def matmul_unpacked(x: Tensor, view: MatrixView) -> Tensor:
    """Do what `matmul_reference` does, for many tokens on the CPU, one slab of rows at a time."""
    layout = view.layout
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not bfloat16_is_quick()):
        return matmul_unpacked(x.float(), view).to(x.dtype)
    out = x.new_empty(x.shape[0], layout.rows)
    step = max(1, SLAB_WEIGHTS // (TILE_ROWS * layout.columns)) * TILE_ROWS
    for start in range(0, layout.rows, step):
        cells = out[:, start : start + step]
        weight = cpu.dequantize_rows(view, x.dtype, start, min(start + step, layout.stored_rows))
        torch.mm(x, weight[:, : cells.shape[1]], out=cells)
    return out if view.bias is None else out.add_(view.bias)


def matmul_gpu(x: Tensor, view: MatrixView) -> Tensor:
    """Do what `matmul_reference` does on a GPU, as if the matrix were the only expert."""
    gpu = gpu_kernels(x.device)
    assert gpu is not None
    count, layout = len(x), view.layout
    x, slots = x.contiguous(), _record_of(view)
    out = x.new_empty(count, layout.rows)
    with launching_on(x.device):
        if count <= MOST_GEMV_TOKENS:
            gpu.gemv(x, slots, _zeros(x.device)[:count], layout, out, tokens=count)
        else:
            cells = torch.arange(count, dtype=torch.int32, device=x.device)
            first = cells[::GPU_BLOCK]
            blocks = torch.stack((first * 0, first, (first + GPU_BLOCK).clamp(max=count)), dim=1)
            gpu.gemm(x, slots, blocks, cells, GPU_BLOCK, layout, out)
    return out


def _record_of(view: MatrixView) -> Tensor:
    """The bytes [1, n] uint8 from the start of the record that `view` is part of."""
    weight = view.weight
    begin = weight.storage_offset() * weight.itemsize - view.layout.weight_offset
    size = weight.untyped_storage().nbytes() - begin
    flat = torch.empty(0, dtype=torch.uint8, device=weight.device)
    return flat.set_(weight.untyped_storage(), begin, (1, size), (size, 1))


@functools.cache
def _zeros(device: torch.device) -> Tensor:
    """The expert slot of each token, which is always 0.

    Kernels are tried before a CUDA graph is captured, so this tensor exists by then.
    """
    return torch.zeros(MOST_GEMV_TOKENS, dtype=torch.int32, device=device)


def matmul(x: Tensor, view: MatrixView) -> Tensor:
    """`x` [M, K] times the transposed matrix in `view`, plus its bias: [M, N], the fastest way."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) > MOST_PACKED_TOKENS:
        return matmul_of_shape(pad(x, (0, 0, 0, -len(x) % FEW_SHAPES)), view)[: len(x)]
    return matmul_of_shape(x, view)


def matmul_of_shape(x: Tensor, view: MatrixView) -> Tensor:
    """Do what `matmul` does without padding x to one of few shapes."""
    asked = x.device.type in ("cpu", "cuda") and x.dtype in KERNEL_DTYPES and len(x) > 0
    if view.scales is None or not asked or x.requires_grad:  # kernels have no gradients
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
    """Whether oneDNN multiplies bfloat16 matrices on this processor.

    Without AVX-512, torch can take 40 to 500 times as long as for float32 (pytorch #146508).
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def cpu_kernel_works(way: Matmul, bits: int, scale_bits: int, dtype: torch.dtype) -> bool:
    """Whether `way`'s kernels compile here and agree with the reference on small products.

    Every number of tokens that has its own kernel is tried, with one thread and with all.
    """
    scheme = Scheme(bits, 32, scale_bits)
    return all(
        _agrees(
            way, sample_matrix(rows, columns, scheme), tokens, dtype, f"CPU kernel for {bits} bits"
        )
        for rows, columns, tokens in ((128, 64, 1), (256, 256, 2), (256, 256, 3), (256, 256, 8))
    )


def _agrees(way: Matmul, view: MatrixView, tokens: int, dtype: torch.dtype, kernel: str) -> bool:
    """Whether `way` runs here and agrees with the reference, up to rounding in half precision.

    If not, a warning says what is wrong; `kernel` names the kernel in it.
    """
    random = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, view.layout.columns, generator=random, dtype=torch.float32)
    x = x.to(view.weight.device, dtype)
    exact = matmul_reference(x.float(), view)
    atol = 0.02 * float(exact.abs().max())
    return kernel_agrees("products", kernel, lambda: way(x, view), exact, rtol=0.02, atol=atol)


def kernel_agrees(
    what: str,
    kernel: str,
    compute: Callable[[], Tensor],
    exact: Tensor,
    *,
    rtol: float,
    atol: float,
) -> bool:
    """Whether a kernel runs here and computes what is close to `exact`.

    If not, a warning says what is wrong with `kernel`, and that `what` will be slow.
    """
    try:
        close = torch.allclose(compute().float(), exact, rtol=rtol, atol=atol)
    except Exception as error:  # compilers and drivers may raise anything
        why = f"{type(error).__name__}: " + " ".join(str(error).split())[:200]
        logger.warning(
            "%s will be slow: the %s does not run on this machine (%s)", what, kernel, why
        )
        return False
    if not close:
        logger.warning("%s will be slow: the %s gives wrong results on this machine", what, kernel)
    return close


@functools.cache
def rows_kernel_works(dtype: torch.dtype, tokens: int) -> bool:
    """Whether the kernel for dense rows compiles here and agrees with `linear`."""
    random = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        for shape in ((tokens, 64), (70, 64), (70,))
    )
    return all(
        kernel_agrees(
            "dense layers",
            f"CPU kernel for {tokens} tokens",
            functools.partial(cpu.multiply_rows, x, weight, given),
            linear(x.float(), weight.float(), None if given is None else given.float()),
            rtol=0.02,
            atol=0.1,
        )
        for given in (None, bias)
    )


@functools.cache
def gpu_kernel_works(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU's kernels compile here and agree with the reference."""
    if gpu_kernels(device) is None:
        return False
    view = sample_matrix(200, 512, scheme, bias=True, device=device)
    return all(
        _agrees(matmul_gpu, view, tokens, dtype, f"GPU kernel for {scheme}")
        for tokens in (1, MOST_GEMV_TOKENS + 1)
    )


def sample_matrix(
    rows: int,
    columns: int,
    scheme: Scheme,
    *,
    bias: bool = False,
    device: torch.device | None = None,
) -> MatrixView:
    """A matrix of random codes, for trying kernels and for measuring."""
    layout = plan_layout((MatrixSpec("sample", rows, columns, bias, torch.bfloat16),), scheme)
    return view_record(sample_record(layout).to(device), layout)["sample"]


def sample_record(layout: RecordLayout, seed: int = 0) -> Tensor:
    """A record of random codes and small scales, for trying kernels and for measuring."""
    random = torch.Generator().manual_seed(seed)  # equal rows would hide a wrong order
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
                codes, steps = encode_scales(pairs)
                view.scales.copy_(codes)
                view.steps.copy_(steps)
        if view.bias is not None:
            view.bias.normal_(generator=random)
    return record
