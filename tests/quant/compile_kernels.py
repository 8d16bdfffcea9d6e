"""Compiles the products' GPU kernels without a GPU, exactly as launches would.

    python -m tests.quant.compile_kernels 75,89 usual|widths|all

Prints one JSON object for each kernel and compute capability. `usual` is what a model in 4 bits and
bfloat16 launches, `widths` has some of every other number of bits, and `all` has the formats,
dtypes and gates of models that people run at home.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from offload.quant.kernels import gpu
from offload.quant.program import Gate
from offload.quant.record import MatrixSpec, plan_layout
from offload.quant.scheme import Scheme
from tests.launches import caught, tell

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SILU, OAI, RELU2 = Gate("silu"), Gate("swiglu_oai", 7.0, 1.702), Gate("relu2")
BLOCKS = (16, 32, 64)  # all that `quant.experts.block_cells` returns
ENDS = (16, 64)
BOTH = ("up", "down")


@dataclass(frozen=True)
class Case:
    """The experts of a layer, as one model has them."""

    name: str
    hidden: int
    inner: int
    k: int  # experts a token
    scheme: Scheme
    dtype: torch.dtype = BF16
    blocks: tuple[int, ...] = ENDS  # numbers of cells that share a product of a prompt
    gate: Gate = SILU
    gated: bool = True
    bias: bool = False
    decoded: tuple[str, ...] = BOTH  # matrices by which one token is multiplied
    prefilled: tuple[str, ...] = BOTH

    def launch(self) -> None:
        """Launch everything that one token and prompts launch."""
        rows, k = self.inner * (1 + self.gated), self.k
        matrices = (
            MatrixSpec("up", rows, self.hidden, self.bias, torch.bfloat16),
            MatrixSpec("down", self.hidden, self.inner, self.bias, torch.bfloat16),
        )
        layout = plan_layout(matrices, self.scheme)
        up, down = layout.matrices
        told = gpu.Gated(self.gate, self.gated, self.bias)
        slots = torch.empty(1, layout.record_bytes, dtype=torch.uint8, device="meta")
        cells = torch.empty(k, dtype=torch.int32)
        blocks = torch.empty(1, 3, dtype=torch.int32)
        hidden = torch.empty(1, self.hidden, dtype=self.dtype)
        raw = torch.empty(k, rows, dtype=self.dtype)
        out = torch.empty(k, self.hidden, dtype=self.dtype)
        inner = torch.empty(k, self.inner, dtype=self.dtype)
        if "up" in self.decoded:
            gpu.gemv(hidden, slots, cells, up, raw, tokens=1)
        if "down" in self.decoded:
            gpu.gemv(raw, slots, cells, down, out, tokens=1, gated=told)
        for size in self.blocks:
            if "up" in self.prefilled:
                gpu.gemm(hidden, slots, blocks, cells, size, up, raw)
            if "down" in self.prefilled:
                gpu.gemm(inner, slots, blocks, cells, size, down, out)
        gpu.activate(raw, cells, told, inner)


def mixtral(scheme: Scheme, dtype: torch.dtype = BF16, blocks: tuple[int, ...] = BLOCKS) -> Case:
    return Case("mixtral", 4096, 14336, 2, scheme, dtype, blocks)


def qwen3(scheme: Scheme, dtype: torch.dtype = BF16, blocks: tuple[int, ...] = ENDS) -> Case:
    return Case("qwen3-30b", 2048, 768, 8, scheme, dtype, blocks)


def gpt_oss(scheme: Scheme, dtype: torch.dtype = BF16, blocks: tuple[int, ...] = ENDS) -> Case:
    return Case("gpt-oss", 2880, 2880, 4, scheme, dtype, blocks, OAI, bias=True)


def usual() -> Iterator[Case]:
    """A case whose rows are cut into parts. A prompt's `down` differs from `up` only in lengths."""
    yield replace(mixtral(Scheme(4)), prefilled=("up",))


def widths() -> Iterator[Case]:
    """Cases of every other width. For one token they have `down` alone, which is `up` with an
    activation; those of 3 and 5 bits are left out because each takes 6 to 13 seconds to compile."""
    for bits in (2, 3, 5, 6, 8, 16):
        decoded = () if bits in (3, 5) else ("down",)
        yield replace(qwen3(Scheme(bits), blocks=(16,)), decoded=decoded, prefilled=("up",))


def every() -> Iterator[Case]:
    """Cases that vary one thing at a time: shapes in 4 bits, dtypes, bits, groups."""
    yield mixtral(Scheme(4))
    yield qwen3(Scheme(4), blocks=BLOCKS)
    yield gpt_oss(Scheme(4), blocks=BLOCKS)
    yield Case("nemotron", 2688, 1856, 6, Scheme(4), gate=RELU2, gated=False)
    yield qwen3(Scheme(4), FP16)
    yield mixtral(Scheme(4), FP16)
    for bits in (2, 3, 4, 5, 6, 8, 16):
        yield qwen3(Scheme(bits))
        yield qwen3(Scheme(bits), FP32)
    for bits in (2, 3, 4):  # the longest rows spill first
        yield mixtral(Scheme(bits), FP32, ())
    for bits in (2, 3, 5, 6, 8):
        yield qwen3(Scheme(bits, 16, 8), blocks=(16,))
    for group in (16, 32, 128, 256):
        yield qwen3(Scheme(4, group), blocks=(16,))


SETS = {"usual": usual, "widths": widths, "all": every}


def main() -> None:
    for case in SETS[sys.argv[2]]():
        for capability in (int(number) for number in sys.argv[1].split(",")):
            gpu.capability = lambda _, cc=capability: divmod(cc, 10)
            name = f"{case.name} {case.scheme} {str(case.dtype).removeprefix('torch.')}"
            tell(name, caught(case.launch), capability)


if __name__ == "__main__":
    main()
