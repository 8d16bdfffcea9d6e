"""Compiles the planning and fetching kernels with no GPU, exactly as launches would.

    python -m tests.offload.engine.device.compile_kernels 75,89 usual|all

prints one JSON object a kernel and compute capability. usual: the policy that is the default.
"""

from __future__ import annotations

import sys

import torch

from offload.engine.device.gather import gather
from offload.engine.device.table import Places, Table
from offload.options import LoadOptions
from tests.launches import caught, tell

CPU = torch.device("cpu")
USUAL = Places(48, 128, 8, 3072, LoadOptions().policy)
ALL = {
    "qwen3-30b": USUAL,
    "qwen3-30b lru": Places(48, 128, 8, 1536, "lru"),
    "mixtral": Places(32, 8, 2, 64, USUAL.policy),
    "gpt-oss": Places(36, 128, 4, 1152, USUAL.policy),
}
SETS = {"usual": {"qwen3-30b": USUAL}, "all": ALL}
RECORD = 1 << 16  # bytes, of which a record has any multiple of 16


def launch(places: Places) -> None:
    """Everything that the layers of one token launch."""
    table, chosen = Table(places, CPU), torch.empty(places.k, dtype=torch.int64)
    slots = torch.empty(2, RECORD, dtype=torch.uint8)
    addresses = torch.empty(places.layers, places.experts, dtype=torch.int64)
    for layer in range(places.layers):
        table.decide(layer, places.experts, chosen)
        gather(chosen, table.loads[layer], addresses[layer], slots, RECORD)
        table.look_ahead(layer, places.experts, chosen)
        guesses, loads = table.guesses[layer], table.guess_loads[layer]
        gather(guesses, loads, addresses[layer], slots, RECORD)


def main() -> None:
    for case, places in SETS[sys.argv[2]].items():
        launches = caught(lambda places=places: launch(places))
        for capability in (int(number) for number in sys.argv[1].split(",")):
            tell(case, launches, capability)


if __name__ == "__main__":
    main()
