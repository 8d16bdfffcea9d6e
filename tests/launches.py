"""What would be launched on a GPU, compiled with none at hand.

For programs of their own: under pytest Triton interprets. A launch is caught, its arguments are
specialised as Triton's launcher does, and the cubin is asked what it takes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            divisible = False
            if parameter.is_constexpr or value is None or one:
                kind = "constexpr"
                self.constants[(at,)] = value
            elif isinstance(value, torch.Tensor):
                kind, divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                kind = "fp32"
            else:
                kind, divisible = "i32", value % 16 == 0
            self.signature[parameter.name] = kind
            unasked = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            if divisible and not unasked:
                self.attributes[(at,)] = [["tt.divisibility", 16]]

    @property
    def specialised(self) -> str:
        """The same for launches that Triton compiles once."""
        told = (self.options, self.signature, self.constants, self.attributes)
        return repr((self.kernel.__name__, *told))

    def compiled(self, capability: int) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options)


def caught(launching: Callable[[], None]) -> list[Launch]:
    """What `launching` would launch, each specialisation once."""
    launches: dict[str, Launch] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = Launch(self, args, named)
        launches.setdefault(launch.specialised, launch)

    before, JITFunction.run = JITFunction.run, run
    try:
        launching()
    finally:
        JITFunction.run = before
    return list(launches.values())


def tell(case: str, launches: Sequence[Launch], capability: int) -> None:
    """Compile and print a line of JSON for each."""
    for launch in launches:
        found: dict[str, Any] = {"case": case, "kernel": launch.kernel.__name__, "cc": capability}
        begin = _processor_seconds()
        try:
            code = launch.compiled(capability).asm
            found |= _resources(code["cubin"]) | _instructions(code["ptx"])
        except Exception as error:  # whatever the compiler raises
            found["error"] = str(error.__cause__ or error)[-600:]
        found["seconds"] = round(_processor_seconds() - begin, 2)
        print(json.dumps(found), flush=True)


def _processor_seconds() -> float:
    """Of this process and of the tools it waited for."""
    return sum(os.times()[:4])


def _instructions(ptx: str) -> dict[str, bool]:
    return {
        "fused doubles": "fma.rn.f64" in ptx,
        "wide loads": "ld.global.v2.b64" in ptx or "ld.global.v4.b32" in ptx,
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory, as the cubin says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("cuobjdump", "--dump-resource-usage", file.name)
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout
