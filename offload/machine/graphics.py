"""GPUs: driver, CUDA, PCIe, and the link's real rate.

Knows: nvidia-smi, sysfs, torch's CUDA. Does not know: what is copied over the link later.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.machine.finding import MISSING, OK, SLOW, Finding
from offload.machine.measure import measure
from offload.units import gib

PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA = "0x10de"
FIELDS = "name,driver_version,pcie.link.gen.current,pcie.link.gen.max,"
FIELDS += "pcie.link.width.current,pcie.link.width.max"
# GB/s a lane, one way, after coding: PCI-SIG, as in `cache.hardware`.
LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
SPEEDS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # GT/s -> generation
SLOW_LINK_GB_PER_S = 10.0
COPY_BYTES = 2**28


@dataclass(frozen=True)
class Slot:
    """A card's connection; 0 where it is not told. At rest the generation may be lower."""

    name: str
    driver: str  # its version; empty when it does not answer
    generation: int
    most_generation: int
    width: int
    most_width: int

    @property
    def gb_per_s(self) -> float:
        """Of its lanes at the highest generation."""
        return LANE_GB_PER_S.get(self.most_generation, 0.0) * self.width


def graphics() -> Iterator[Finding]:
    """The driver, torch's CUDA, and each card."""
    slots = nvidia_slots() or sysfs_slots(PCI_DEVICES)
    drivers = sorted({slot.driver for slot in slots if slot.driver})
    if slots and not drivers:
        yield Finding(
            "driver",
            f"none answers, though {len(slots)} NVIDIA cards are plugged in",
            MISSING,
            "install NVIDIA's driver, then see whether nvidia-smi answers",
        )
    elif drivers:
        yield Finding("driver", ", ".join(drivers))
    yield _cuda(bool(slots))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding(
            "GPU",
            "none that torch sees",
            MISSING,
            "the CPU computes; a card with CUDA is several times faster",
        )
    for index in range(count):
        yield from _card(index)
    for slot in nvidia_slots() or slots:  # asked again: copies have woken the link
        yield _pcie(slot)


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
    pageable = _pageable_rate(device)
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
        "see its PCIe slot below: generation 3 with 16 lanes reaches 13" if slow else "",
        {"pinned_gb_per_s": pinned, "pageable_gb_per_s": pageable},
    )


def _pageable_rate(device: torch.device) -> float:
    """GB/s to the card from memory that is not pinned."""
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


def _pcie(slot: Slot) -> Finding:
    data = {"generation": slot.generation, "width": slot.width, "most_width": slot.most_width}
    if not slot.width:
        return Finding("PCIe", f"{slot.name}: not readable here", data=data)
    value = (
        f"{slot.name}: generation {slot.generation} of {slot.most_generation}, "
        f"x{slot.width} of x{slot.most_width}, {slot.gb_per_s:.0f} GB/s at most"
    )
    if slot.width < slot.most_width:
        remedy = "the card has fewer lanes than it could: use the slot nearest to the processor"
        return Finding("PCIe", value, SLOW, remedy, data)
    return Finding("PCIe", value, data=data)


def nvidia_slots() -> list[Slot]:
    """What nvidia-smi says of each card; nothing when it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_slots(done.stdout) if done.returncode == 0 else []


def parse_slots(text: str) -> list[Slot]:
    """The lines of nvidia-smi for `FIELDS`."""
    slots = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(FIELDS.split(",")):
            name, driver, *numbers = cells
            slots.append(Slot(name, driver, *map(_number, numbers)))
    return slots


def sysfs_slots(devices: Path) -> list[Slot]:
    """NVIDIA's display cards as Linux lists them."""
    return [
        Slot(
            f"NVIDIA card at {device.name}",
            "",
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
    """From text like `16.0 GT/s PCIe`."""
    return SPEEDS.get(speed.partition(" ")[0], 0)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
