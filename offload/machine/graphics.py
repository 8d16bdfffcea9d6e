"""Examines GPUs: their driver, CUDA, PCIe ports, and the rate of copies to them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.machine.finding import MISSING, OK, SLOW, Finding
from offload.machine.measure import measure
from offload.units import gib

PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA = "0x10de"
# GB/s of one lane in one direction, after coding (PCI-SIG).
LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
SPEEDS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # GT/s -> generation
SLOW_LINK_GB_PER_S = 10.0
COPY_BYTES = 2**28


@dataclass(frozen=True)
class PciePort:
    """How a card is connected; numbers are 0 if unknown. An idle card may lower its generation."""

    card: str
    generation: int
    most_generation: int
    width: int  # lanes
    most_width: int

    @property
    def gb_per_s(self) -> float:
        """The rate of the card's lanes at the highest generation."""
        return LANE_GB_PER_S.get(self.most_generation, 0.0) * self.width


def installed_nvml() -> Any:
    """NVIDIA's management library for Python (nvidia-ml-py), or None if it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def graphics(devices: Path = PCI_DEVICES) -> Iterator[Finding]:
    """Findings about the driver, torch's CUDA, and each card.

    `devices` is where Linux lists what is plugged in.
    """
    nvml = installed_nvml()
    listed = linux_ports(devices)
    driver, ports = nvml_ports(nvml) if nvml else ("", [])
    has_card = bool(ports or listed)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if driver:
        yield Finding("driver", driver)
    elif nvml is None and (listed or count):
        remedy = "pip install nvidia-ml-py"
        yield Finding("driver", "not asked: nvidia-ml-py is not installed", MISSING, remedy)
    elif listed:
        yield Finding(
            "driver",
            f"none answers; NVIDIA GPUs that are plugged in: {len(listed)}",
            MISSING,
            "install NVIDIA's driver, then check that nvidia-smi answers",
        )
    yield _cuda(has_card)
    if not count:
        yield Finding(
            "GPU",
            "no GPU found",
            MISSING,
            "the CPU computes; an NVIDIA GPU is several times faster",
        )
    for index in range(count):
        yield from _card(index)
    if ports:  # read again, because copies have woken the links
        _, ports = nvml_ports(nvml)
    for port in ports or linux_ports(devices):
        yield _pcie(port)


def _cuda(has_card: bool) -> Finding:
    built = torch.version.cuda
    if built is None:
        remedy = "install a torch with CUDA: https://pytorch.org/get-started/locally"
        verdict, text = (MISSING, remedy) if has_card else (OK, "")
        return Finding("CUDA", f"torch {torch.__version__} has none", verdict, text)
    if has_card and not torch.cuda.is_available():
        remedy = f"torch wants CUDA {built}: update the driver, check CUDA_VISIBLE_DEVICES"
        return Finding("CUDA", f"{built}, not usable", MISSING, remedy, {"cuda": built})
    return Finding("CUDA", built, data={"cuda": built})


def _card(index: int) -> Iterator[Finding]:
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    yield Finding(
        f"GPU {index}",
        f"{about.name}, {gib(total)}, {gib(free)} free, compute {about.major}.{about.minor}",
        SLOW if free < total / 2 else OK,
        "more than half of its memory is taken: see nvidia-smi" if free < total / 2 else "",
        {"total_bytes": total, "free_bytes": free, "capability": [about.major, about.minor]},
    )
    device = torch.device("cuda", index)
    pageable = pageable_rate(device)
    try:
        rates = measure(device)
    except RuntimeError:  # what torch raises when memory cannot be pinned
        remedy = "raise the limit of locked memory (ulimit -l); on WSL or Windows use less RAM"
        value = f"{pageable:.1f} GB/s; memory cannot be pinned"
        yield Finding(f"link {index}", value, MISSING, remedy, {"pageable_gb_per_s": pageable})
        return
    pinned, vram = rates.link_gb_per_s, rates.memory_gb_per_s
    yield Finding(f"VRAM {index}", f"weights read at {vram:.0f} GB/s", data={"gb_per_s": vram})
    slow = pinned < SLOW_LINK_GB_PER_S
    yield Finding(
        f"link {index}",
        f"{pinned:.1f} GB/s from pinned memory, {pageable:.1f} from other",
        SLOW if slow else OK,
        "see its PCIe port below: generation 3 with 16 lanes reaches 13" if slow else "",
        {"pinned_gb_per_s": pinned, "pageable_gb_per_s": pageable},
    )


def pageable_rate(device: torch.device) -> float:
    """The rate in GB/s of copies to the card from memory that is not pinned."""
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    here = torch.ones(COPY_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        there.copy_(here)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return COPY_BYTES / min(seconds[1:]) / 1e9


def _pcie(port: PciePort) -> Finding:
    data = {"generation": port.generation, "width": port.width, "most_width": port.most_width}
    if not port.width:
        return Finding("PCIe", f"{port.card}: not readable here", data=data)
    value = (
        f"{port.card}: generation {port.generation} of {port.most_generation}, "
        f"x{port.width} of x{port.most_width}, {port.gb_per_s:.0f} GB/s at most"
    )
    if port.width < port.most_width:
        remedy = "the GPU has fewer lanes than it could: use the port nearest to the processor"
        return Finding("PCIe", value, SLOW, remedy, data)
    return Finding("PCIe", value, data=data)


def nvml_ports(nvml: Any) -> tuple[str, list[PciePort]]:
    """The driver's version and each card's port; ("", []) if no driver answers."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return "", []
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        cards = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return driver, [_nvml_port(nvml, card) for card in cards]
    except nvml.NVMLError:
        return "", []
    finally:
        nvml.nvmlShutdown()


def _nvml_port(nvml: Any, card: Any) -> PciePort:
    def number(name: str) -> int:
        try:
            return int(getattr(nvml, f"nvmlDeviceGet{name}")(card))
        except nvml.NVMLError:  # a virtual card does not know its port
            return 0

    return PciePort(
        str(nvml.nvmlDeviceGetName(card)),
        number("CurrPcieLinkGeneration"),
        number("MaxPcieLinkGeneration"),
        number("CurrPcieLinkWidth"),
        number("MaxPcieLinkWidth"),
    )


def linux_ports(devices: Path) -> list[PciePort]:
    """The ports of NVIDIA's display cards, which Linux lists even without a driver."""
    return [
        PciePort(
            f"NVIDIA GPU at {device.name}",
            _generation(_line(device / "current_link_speed")),
            _generation(_line(device / "max_link_speed")),
            _number(_line(device / "current_link_width")),
            _number(_line(device / "max_link_width")),
        )
        for device in (sorted(devices.iterdir()) if devices.is_dir() else [])
        if _line(device / "vendor") == NVIDIA and _line(device / "class").startswith("0x03")
    ]


def _line(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _generation(speed: str) -> int:
    """The PCIe generation of a text like `16.0 GT/s PCIe`; 0 if unknown."""
    return SPEEDS.get(speed.partition(" ")[0], 0)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
