"""Machines to predict for: what their memories, links and disks move, from published figures.

Knows: rates and delays of a machine. Does not know: models, plans, what software adds
(`cache.simulator.Software`), nor how this machine is measured (`offload.machine`).

Bandwidths and memory sizes are the makers': NVIDIA's Ampere GA102, Ada and Blackwell architecture
papers (RTX 3080, 3090, 4080, 4090, 5070 Ti, 5080, 5090), its product pages (RTX 3060, 3080 Laptop)
and data sheets (T4, A100). PCIe rates are the lanes' raw ones after 128b/130b coding (PCI-SIG).
"""

from __future__ import annotations

from dataclasses import dataclass

PCIE3_X16, PCIE4_X16, PCIE5_X16 = 15.75, 31.51, 63.02  # GB/s one way
# Measured beside the raw rate: 26.7 GB/s of 31.5 (RTX 4090), 56 of 63 (RTX 5090).
PINNED_SHARE = 0.85
# Copies from memory that is not pinned run at 6-7 GB/s where pinned ones reach 20.
PAGEABLE_SHARE = 0.325  # of a pinned copy
# A kernel that streams weights reaches about this much of the memory's published rate.
MEMORY_SHARE = 0.85
DDR4_3200_X2, DDR4_3200_X8, DDR5_6000_X2 = 51.2, 204.8, 96.0  # GB/s, JEDEC: 8 bytes a transfer
NVME_PCIE4_X4 = 7.0  # GB/s, the usual data sheet's sequential read
LINK_LATENCY = 10e-6  # seconds: enqueue, DMA start and event of one copy
DISK_LATENCY = 80e-6  # seconds, one NVMe read
LAUNCH = 5e-6  # seconds the host spends on one kernel


@dataclass(frozen=True)
class Hardware:
    """One machine. Rates are what is really reached, in 10^9 bytes a second."""

    name: str
    memory_gb_per_s: float  # where the slots are
    link_gb_per_s: float  # RAM to slots, of one card
    ram_gb_per_s: float
    disk_gb_per_s: float = NVME_PCIE4_X4
    link_latency_seconds: float = LINK_LATENCY
    disk_latency_seconds: float = DISK_LATENCY
    launch_seconds: float = LAUNCH
    tflops: float = 1e3  # half precision, dense; only a prompt can be limited by it
    cards: int = 1
    runs_ahead: bool = True  # the host queues work and goes on; False where it computes itself
    memory_bytes: int | None = None  # of a card; None: not known

    def copy_seconds(self, size: int, *, from_disk: bool = False) -> float:
        """Seconds one copy of `size` bytes holds the link."""
        rate = min(self.link_gb_per_s, self.ram_gb_per_s) * 1e9
        seconds = self.link_latency_seconds + size / rate
        if from_disk:  # the record goes through RAM: read whole, then copied
            seconds += self.disk_latency_seconds + size / (self.disk_gb_per_s * 1e9)
        return seconds

    def compute_seconds(self, size: float, flops: float) -> float:
        """Seconds to stream `size` bytes of weights and do `flops` operations with them."""
        return max(size / (self.memory_gb_per_s * 1e9), flops / (self.tflops * 1e12))


def _gpu(
    name: str, gib: int, memory: float, pcie: float, tflops: float, *, ram: float, cards: int = 1
) -> Hardware:
    return Hardware(
        name,
        memory_gb_per_s=memory * MEMORY_SHARE,
        link_gb_per_s=pcie * PINNED_SHARE,
        ram_gb_per_s=ram,
        tflops=tflops,
        cards=cards,
        memory_bytes=gib * 2**30,
    )


# GeForce: FP16 tensor operations with FP32 accumulation, dense.
PROFILES: dict[str, Hardware] = {
    profile.name: profile
    for profile in (
        _gpu("RTX 3060", 12, 360.0, PCIE4_X16, 25.5, ram=DDR4_3200_X2),  # 15 Gbps, 192 bits
        _gpu("RTX 3080", 10, 760.0, PCIE4_X16, 59.5, ram=DDR4_3200_X2),  # 19 Gbps, 320 bits
        _gpu("RTX 3080 Mobile", 16, 448.0, PCIE4_X16, 38.0, ram=DDR4_3200_X2),  # 14 Gbps, 256
        _gpu("RTX 3090", 24, 936.0, PCIE4_X16, 71.0, ram=DDR4_3200_X2),  # 19.5 Gbps, 384 bits
        _gpu("RTX 4080", 16, 716.8, PCIE4_X16, 97.5, ram=DDR5_6000_X2),  # 22.4 Gbps, 256 bits
        _gpu("RTX 4090", 24, 1008.0, PCIE4_X16, 165.2, ram=DDR5_6000_X2),  # 21 Gbps, 384 bits
        _gpu("2x4090", 24, 1008.0, PCIE4_X16, 165.2, ram=DDR5_6000_X2, cards=2),
        _gpu("RTX 5070 Ti", 16, 896.0, PCIE5_X16, 87.9, ram=DDR5_6000_X2),  # 28 Gbps, 256 bits
        _gpu("RTX 5080", 16, 960.0, PCIE5_X16, 112.6, ram=DDR5_6000_X2),  # 30 Gbps, 256 bits
        _gpu("RTX 5090", 32, 1792.0, PCIE5_X16, 209.5, ram=DDR5_6000_X2),  # 28 Gbps, 512 bits
        _gpu("T4", 16, 320.0, PCIE3_X16, 65.0, ram=DDR4_3200_X2),  # data sheet: 320+ GB/s
        _gpu("A100", 80, 2039.0, PCIE4_X16, 312.0, ram=DDR4_3200_X8),  # 80 GB SXM data sheet
    )
}


def find_hardware(name: str) -> Hardware | None:
    """The profile called `name`, whatever its case and spaces, with or without "NVIDIA", "GeForce"
    and "RTX"; None when there is none."""

    def plain(text: str) -> str:
        words = text.casefold().replace(" ", "").replace("-", "")
        for prefix in ("nvidia", "geforce", "rtx"):
            words = words.removeprefix(prefix)
        return words

    return {plain(known): profile for known, profile in PROFILES.items()}.get(plain(name))


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
