"""The processor: its name, cores, instruction sets, and whether the kernels for it work.

Knows: instruction sets' names, torch's threads. Does not know: what a kernel computes
(`quant.matmul`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import torch

from offload.machine.finding import MISSING, OK, SLOW, Finding
from offload.machine.processor import BUSY, about_processor, processor_name, programs_a_core
from offload.quant.matmul import cpu_kernel_works, matmul_packed, matmul_unpacked

SETS = {  # flag of Linux -> what people call it
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "VNNI",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
}
BITS = (2, 3, 4, 5, 6, 8)


def processor() -> Iterator[Finding]:
    """Cores, instruction sets, kernels."""
    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False)
    load = programs_a_core()
    busy = load > BUSY
    yield Finding(
        "processor",
        f"{processor_name()}, {cores} cores, {threads} thread{'s' * (threads != 1)} used",
        SLOW if busy else OK,
        f"{load:.1f} programs a core are running: rates found here are too low" if busy else "",
        {"cores": cores, "threads": threads, "load": load},
    )
    yield _instruction_sets(about_processor())
    yield _kernels()


def _instruction_sets(about: dict[str, str]) -> Finding:
    flags = set((about.get("flags") or about.get("Features") or "").split())
    known = [text for flag, text in SETS.items() if flag in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    data = {"instruction_sets": known, "torch_capability": capability}
    value = f"{', '.join(known) or 'not readable here'}; torch uses {capability}"
    if flags and not flags & {"avx2", "asimd"}:
        remedy = "without AVX2 or NEON the CPU is many times slower: use a GPU or another machine"
        return Finding("instruction sets", value, SLOW, remedy, data)
    return Finding("instruction sets", value, data=data)


def _kernels() -> Finding:
    """Whether each number of bits has kernels that compile here and give the right figures."""
    begin = time.perf_counter()
    broken = [
        bits
        for bits in BITS
        if not all(
            cpu_kernel_works(way, bits, 16, torch.bfloat16)
            for way in (matmul_packed, matmul_unpacked)
        )
    ]
    seconds = time.perf_counter() - begin
    data = {"broken_bits": broken, "seconds": seconds}
    if broken:
        return Finding(
            "CPU kernels",
            f"do not work for {', '.join(map(str, broken))} bits",
            MISSING,
            "pip install -U llvmlite; until then products are many times slower",
            data,
        )
    return Finding("CPU kernels", f"compiled and right for {BITS[0]} to {BITS[-1]} bits", data=data)
