"""Compiles the planning and fetching kernels with no GPU; run as a program of its own.

    python -m tests.offload.device.compile_kernels 75,89

writes one JSON object a kernel and compute capability.
"""

from __future__ import annotations

import json
import sys

import torch
from triton.runtime.jit import JITFunction

from offload.device.gather import gather
from offload.device.places import Places
from offload.device.table import Table
from tests.quant.compile_kernels import Launch, caught, resources

CPU = torch.device("cpu")
CASES = {
    "qwen3-30b lfru": Places(48, 128, 8, 3072, "lfru", "shared"),
    "qwen3-30b lru": Places(48, 128, 8, 1536, "lru", "global"),
}


def launch(places: Places) -> None:
    """Everything a layer's step launches."""
    table, chosen = Table(places, CPU), torch.empty(places.k, dtype=torch.int64)
    table.plan(7, places.experts, chosen)
    table.look_ahead(7, places.experts, chosen)
    addresses = torch.empty(places.experts, dtype=torch.int64)
    slots = torch.empty(2, 1 << 16, dtype=torch.uint8)
    gather(table.guesses[0], table.guess_loads[0], addresses, slots, 1 << 16)


def main() -> None:
    for case, places in CASES.items():
        launches: list[Launch] = []
        JITFunction.run = caught(launches)  # type: ignore[method-assign]
        launch(places)
        for one in launches:
            for capability in (int(number) for number in sys.argv[1].split(",")):
                compiled = one.compiled(capability)
                ptx = compiled.asm["ptx"]
                found = {
                    "case": case,
                    "kernel": one.kernel.__name__,
                    "cc": capability,
                    "fused": "fma.rn.f64" in ptx,
                    "wide": "ld.global.v2.b64" in ptx or "ld.global.v4.b32" in ptx,
                    **resources(compiled.asm["cubin"]),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
