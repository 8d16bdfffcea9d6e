"""The machine to plan for, this one or one that is named, resolved to numbers."""

import contextlib
from dataclasses import dataclass, replace

import psutil
import torch

from offload.budget.budget import Memory
from offload.budget.resolve import find_device
from offload.errors import BudgetError
from offload.files import offload_home
from offload.machine.hardware import PROFILES, Hardware, find_hardware
from offload.machine.measure import measure, read_rate
from offload.options import LoadOptions
from offload.units import SHARE, parse_bytes

MOST_CARDS = 64
LEAST_BYTES = 2**20  # least size accepted without a unit; below it, GiB was probably meant
ASSUMED = (
    "rates of link, RAM and disk are assumed, not measured: the card uses all of its PCIe lanes, "
    "RAM is what is usual beside such a card, and the disk is an NVMe disk on PCIe 4"
)
DISK_BYTES = 2**26  # that are read to measure the disk


@dataclass(frozen=True)
class Target:
    """A machine and what of it may be used."""

    hardware: Hardware  # with its number of cards
    device: torch.device
    memory: Memory  # that may be used: of one card (on a CPU: of RAM), and of RAM
    spare_bytes: int  # of RAM, for experts that are not in slots; on a CPU slots take from it too
    here: bool  # whether it is this machine
    notes: tuple[str, ...] = ()

    @property
    def cards(self) -> int:
        return self.hardware.cards

    @property
    def name(self) -> str:
        return f"{self.cards} x {self.hardware.name}" if self.cards > 1 else self.hardware.name


def this_machine(options: LoadOptions, cards: int | None) -> Target:
    """This machine, measured, with the memory that is free or that the user gives.

    Raises `BudgetError`.
    """
    device = find_device(options.device)
    count = _checked(cards or 1)
    if device.type != "cuda" and count > 1:
        raise BudgetError(f"there are no {count} GPUs here: name one with --gpu, like 4090")
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise BudgetError(
            f"there are {torch.cuda.device_count()} GPUs here, not {count}: name them with --gpu"
        )
    memory = Memory.of(device, options.vram, options.ram)
    hardware = replace(measure(device), cards=count)
    with contextlib.suppress(OSError):  # the disk of the packs cannot always be measured
        rate = read_rate(offload_home(), DISK_BYTES)
        hardware = replace(hardware, disk_gb_per_s=rate.gb_per_s)
    free = int(psutil.virtual_memory().available * SHARE)  # what is left serves as page cache
    spare = memory.ram if device.type == "cuda" else max(free, memory.ram)
    return Target(hardware, device, memory, spare, here=True)


def named_machine(gpu: str, options: LoadOptions, cards: int | None) -> Target:
    """A machine with cards called `gpu`, which may use the same share of its memory as `load`.

    Raises `BudgetError`.
    """
    found = find_hardware(gpu)
    if found is None:
        known = ", ".join(PROFILES)
        raise BudgetError(
            f"no GPU is known by the name {gpu!r}: choose one of {known}; for another card, choose "
            "the most similar one and give the memory with --vram"
        )
    notes = [ASSUMED]
    for text in (options.vram, options.ram):
        bare = isinstance(text, str) and text.isdecimal()
        if bare and 0 < (parse_bytes(text) or 0) < LEAST_BYTES:
            raise BudgetError(f"{text!r} is that many bytes: write the unit too, like 20GiB")
    host = parse_bytes(options.ram)
    if host is None:
        host = psutil.virtual_memory().total
        notes.append(f"RAM is this machine's, {host / 2**30:.0f} GiB: --ram gives another")
    given = parse_bytes(options.vram)
    size = found.memory_bytes if given is None else given
    assert size is not None, "a profile without the size of its memory"
    # The name of a profile of several cards tells their number, which may be another here.
    name = next(p.name for p in PROFILES.values() if replace(found, name=p.name, cards=1) == p)
    memory = Memory(int(size * SHARE), int(host * SHARE))
    return Target(
        replace(found, name=name, cards=_checked(cards or found.cards)),
        torch.device("cuda"),
        memory,
        memory.ram,
        here=False,
        notes=tuple(notes),
    )


def _checked(cards: int) -> int:
    if cards > MOST_CARDS:
        raise BudgetError(f"{cards} cards: offload plan takes at most {MOST_CARDS}")
    return cards
