"""How fast machines are: published rates of graphics cards, and the class that measuring fills.

Bandwidths and memory sizes are from NVIDIA's Ampere GA102, Ada and Blackwell architecture papers
(RTX 3080, 3090, 4080, 4090, 5070 Ti, 5080, 5090), product pages (RTX 3060, 3080 Laptop) and data
sheets (T4, A100). PCIe rates are the raw rates of the lanes after 128b/130b coding (PCI-SIG).
"""

from dataclasses import dataclass

PCIE3_X16, PCIE4_X16, PCIE5_X16 = 15.75, 31.51, 63.02  # GB/s one way
# The share of the raw rate that copies from pinned memory reach. 26.7 GB/s of 31.5 were measured on
# an RTX 4090, and 56 of 63 on an RTX 5090.
PINNED_SHARE = 0.85
MEMORY_SHARE = 0.85  # the share of a memory's published rate that kernels reach on weights
DDR4_3200_X2, DDR4_3200_X8, DDR5_6000_X2 = 51.2, 204.8, 96.0  # GB/s, JEDEC: 8 bytes a transfer
NVME_PCIE4_X4 = 7.0  # GB/s of sequential reads, as most data sheets say
LINK_LATENCY = 10e-6  # seconds of one copy: enqueueing, start of the DMA engine, event
DISK_LATENCY = 80e-6  # seconds of one NVMe read
LAUNCH = 5e-6  # seconds that the host needs to launch one kernel


@dataclass(frozen=True)
class Hardware:
    """One machine. Its rates are those that programs really reach, in 10^9 bytes a second."""

    name: str
    memory_gb_per_s: float  # of the memory that the expert slots are in: VRAM, or RAM on a CPU
    link_gb_per_s: float  # from RAM to the slots of one card
    ram_gb_per_s: float
    disk_gb_per_s: float = NVME_PCIE4_X4
    link_latency_seconds: float = LINK_LATENCY
    disk_latency_seconds: float = DISK_LATENCY
    launch_seconds: float = LAUNCH
    tflops: float = 1e3  # half precision, dense; it can only limit the reading of a prompt
    cards: int = 1
    runs_ahead: bool = True  # whether the host only queues work; False if it computes (CPU)
    memory_bytes: int | None = None  # of one card; None if unknown

    def copy_seconds(self, size: int, *, from_disk: bool = False) -> float:
        """Seconds for which one copy of `size` bytes occupies the link."""
        rate = min(self.link_gb_per_s, self.ram_gb_per_s) * 1e9
        seconds = self.link_latency_seconds + size / rate
        if from_disk:  # the record is read into RAM as a whole, then copied
            seconds += self.disk_latency_seconds + size / (self.disk_gb_per_s * 1e9)
        return seconds


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


# TFLOPS of GeForce cards are those of dense FP16 tensor operations with FP32 accumulation.
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
    """The profile called `name`, or None if there is none.

    Case, spaces and hyphens make no difference, and "NVIDIA", "GeForce" and "RTX" may be left out.
    """

    def plain(text: str) -> str:
        words = text.casefold().replace(" ", "").replace("-", "")
        for prefix in ("nvidia", "geforce", "rtx"):
            words = words.removeprefix(prefix)
        return words

    return {plain(known): profile for known, profile in PROFILES.items()}.get(plain(name))
