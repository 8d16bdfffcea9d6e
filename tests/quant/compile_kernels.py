"""Compiles the GPU kernels with no GPU, exactly as launches would; run as a program of its own.

Under pytest Triton interprets; here it compiles. What is launched is caught, its arguments are
specialised as Triton's launcher does, and the cubin is asked what it takes.

    python -m tests.quant.compile_kernels 75,89 quick|all

writes one JSON object a kernel and compute capability. quick: one model's shapes in 4 bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quant.gate import Gate
from quant.kernels import gpu
from quant.record import MatrixSpec, RecordLayout, plan_layout
from quant.scheme import Scheme

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


class Launch:
    """One kernel with everything it is specialised for."""

    def __init__(self, kernel: JITFunction, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        self.signature: dict[str, str] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        for at, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            divisible = False
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                kind = "constexpr"
                self.constants[(at,)] = value
            elif isinstance(value, torch.Tensor):
                kind, divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                kind = "fp32"
            else:
                kind, divisible = "i32", value % 16 == 0
            self.signature[parameter.name] = kind
            if divisible:
                self.attributes[(at,)] = [["tt.divisibility", 16]]

    def compiled(self, capability: int) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options)


def caught(launches: list[Launch]) -> Any:
    """In place of `JITFunction.run`: notes what would be launched."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(Launch(self, args, named))

    return run


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory, as the cubin says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = tool("cuobjdump", "--dump-resource-usage", file.name)
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def launch(layout: RecordLayout, gated: bool, gate: Gate | None, dtype: torch.dtype) -> None:
    """Everything an experts layer launches: a token of 8 experts, a block of each size."""
    up, down = layout.matrices
    k, inner = 8, down.columns
    told = gpu.Gated(gate, gated, up.bias_offset >= 0)
    slots = torch.empty(1, layout.record_bytes, dtype=torch.uint8, device="meta")
    cells = torch.empty(k, dtype=torch.int32)
    hidden, raw = torch.empty(1, up.columns, dtype=dtype), torch.empty(k, up.rows, dtype=dtype)
    out = torch.empty(k, down.rows, dtype=dtype)
    gpu.gemv(hidden, slots, cells, up, raw, tokens=1)
    gpu.gemv(raw, slots, cells, down, out, tokens=1, gated=told)
    blocks = torch.empty(1, 3, dtype=torch.int32)
    for size in (16, 64):
        gpu.gemm(hidden, slots, blocks, cells, size, up, raw)
    gpu.activate(raw, cells, told, raw.new_empty(k, inner))


def cases(which: str) -> Iterator[tuple[str, RecordLayout, bool, Gate | None, torch.dtype]]:
    """The shapes of models at home, in every format."""

    def layout(
        hidden: int, inner: int, scheme: Scheme, bias: bool = False, gated: bool = True
    ) -> RecordLayout:
        name = "gate_up_proj" if gated else "up_proj"
        up = MatrixSpec(name, inner * (1 + gated), hidden, bias, torch.bfloat16)
        return plan_layout(
            (up, MatrixSpec("down_proj", hidden, inner, bias, torch.bfloat16)), scheme
        )

    silu, oai = Gate("silu"), Gate("swiglu_oai", 7.0, 1.702)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield "gpt-oss q4", layout(2880, 2880, Scheme(4), True), True, oai, bf16
    if which == "all":
        yield "mixtral q4", layout(4096, 14336, Scheme(4)), True, silu, bf16
        yield "mixtral q4 fp16", layout(4096, 14336, Scheme(4)), True, silu, fp16
        yield "qwen3-30b q4", layout(2048, 768, Scheme(4)), True, silu, bf16
        yield "qwen3-30b q4 fp16", layout(2048, 768, Scheme(4)), True, silu, fp16
        yield "qwen3-30b q4 fp32", layout(2048, 768, Scheme(4)), True, silu, fp32
        for bits in (2, 3, 5, 6, 8):
            yield f"qwen3-30b q{bits}", layout(2048, 768, Scheme(bits, 64)), True, silu, bf16
            yield (
                f"qwen3-30b q{bits}-16-8",
                layout(2048, 768, Scheme(bits, 16, 8)),
                True,
                silu,
                bf16,
            )
        for group in (16, 32, 128, 256):
            yield f"qwen3-30b q4 g{group}", layout(2048, 768, Scheme(4, group)), True, silu, bf16
        yield "nemotron q4", layout(2688, 1856, Scheme(4), False, False), False, Gate("relu2"), bf16
        yield "qwen3-30b 16", layout(2048, 768, Scheme(16)), True, silu, bf16
        yield "qwen3-30b 16 fp32", layout(2048, 768, Scheme(16)), True, silu, fp32


def main() -> None:
    capabilities = [int(number) for number in sys.argv[1].split(",")]
    for name, layout, gated, gate, dtype in cases(sys.argv[2]):
        for capability in capabilities:
            launches: list[Launch] = []
            JITFunction.run = caught(launches)
            gpu.capability = lambda _, cc=capability: divmod(cc, 10)
            launch(layout, gated, gate, dtype)
            for one in launches:
                found: dict[str, Any] = {"case": name, "kernel": one.kernel.__name__}
                found["cc"] = capability
                try:
                    found |= resources(one.compiled(capability).asm["cubin"])
                except Exception as error:  # whatever the compiler raises
                    found["error"] = str(error.__cause__ or error)[-600:]
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
