"""What a runtime adds to the hardware's own time: Python between two layers, extra passes over
memory.

Knows: costs of a piece of software, each measured somewhere or derived. Does not know: machines.
"""

from __future__ import annotations

from dataclasses import dataclass

# transformers' Python around the matmuls of 30 layers takes about 14 ms a token.
TRANSFORMERS_LAYER = 14e-3 / 30
GUESS = 150e-6  # asking the next router and planning its loads: 0.1-0.2 ms (docs/log.md)


@dataclass(frozen=True)
class Software:
    """A runtime's own costs."""

    name: str
    host_seconds_per_layer: float
    host_seconds_per_token: float = 0.0
    start_seconds_per_layer: float = 0.0  # of the device, between kernels that are queued already
    guess_seconds: float = 0.0
    launches_per_expert: int = 4  # kernels: two products, activation, sum
    memory_passes: float = 1.0  # bytes through device memory for a byte of weights
    link_share: float = 1.0  # of the hardware's rate for pinned copies
    host_waits: bool = False  # for each copy; else only the device does


# This project's engine as it is: a plan in Python and a sync for each layer.
HOST_PLANNED = Software("host-planned", TRANSFORMERS_LAYER, guess_seconds=GUESS)
# A whole-token CUDA graph: one launch a token, nothing for a layer on the host (FreeToken, field
# figures). The device still starts some ten kernels a layer, one after the other, 2 microseconds
# each: with it Qwen3-30B-A3B, all resident on an RTX 4090, gets 199 tokens/s; 196 were published.
DEVICE_PLANNED = Software(
    "device-planned",
    0.0,
    host_seconds_per_token=50e-6,
    start_seconds_per_layer=10 * 2e-6,
    launches_per_expert=0,
)
SOFTWARE = {software.name: software for software in (HOST_PLANNED, DEVICE_PLANNED)}
