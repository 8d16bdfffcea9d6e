"""The machine to plan for, this one or one that is named, resolved to numbers."""

import contextlib
from dataclasses import dataclass, replace

import torch

from offload.budget.budget import Memory
from offload.budget.resolve import Place
from offload.files import offload_home
from offload.fit import Card
from offload.machine.hardware import Hardware
from offload.machine.measure import measure, read_rate
from offload.machine.memory import ram
from offload.options import LoadOptions
from offload.units import SHARE, gib, parse_bytes

ASSUMED = "rates are assumed, not measured: full-width PCIe slot, typical RAM, PCIe 4 NVMe"
DISK_BYTES = 2**26  # that are read to measure the disk


@dataclass(frozen=True)
class Target:
    """A machine and what of it may be used."""

    hardware: Hardware  # with its number of cards; of several cards, the slowest
    place: Place  # the memory that may be used there
    spare_bytes: int  # of RAM, for experts that are not in slots; on a CPU slots take from it too
    here: bool  # whether it is this machine
    notes: tuple[str, ...] = ()
    stand_in: str = ""  # says that the figures are those of another card than the one named

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def memory(self) -> Memory:
        return self.place.memory

    @property
    def cards(self) -> int:
        return max(1, len(self.place.cards))

    @property
    def card_bytes(self) -> list[int]:
        """Bytes that may be used on each card, or in RAM where there is none."""
        return [card.memory for card in self.place.cards] or [self.memory.device]

    @property
    def name(self) -> str:
        return f"{self.cards} x {self.hardware.name}" if self.cards > 1 else self.hardware.name


def this_machine(place: Place) -> Target:
    """This machine, measured, with the memory of `place`."""
    on_cpu = place.device.type == "cpu"
    devices = list(dict.fromkeys(card.device for card in place.cards)) or [place.device]
    measured = [measure(device) for device in devices]
    # Cards work in turn, and each token passes through all of them.
    slowest = min(measured, key=lambda hardware: hardware.memory_gb_per_s)
    link = min(hardware.link_gb_per_s for hardware in measured)
    hardware = replace(slowest, link_gb_per_s=link, cards=max(1, len(place.cards)))
    with contextlib.suppress(OSError):  # the disk of the packs cannot always be measured
        rate = read_rate(offload_home(), DISK_BYTES)
        hardware = replace(hardware, disk_gb_per_s=rate.gb_per_s)
    spare = place.memory.ram
    if on_cpu:  # what is left serves as page cache
        spare = max(int(ram().available * SHARE), spare)
    return Target(hardware, place, spare, here=True)


def named_machine(found: Hardware, note: str, options: LoadOptions) -> Target:
    """A machine with the cards `found`, which may use the same share of its memory as `load`.

    `note` says so if `found` is not the card that the user named.
    """
    notes = [ASSUMED]
    host = parse_bytes(options.ram)
    if host is None:
        host = ram().total
        notes.append(f"RAM is this machine's, {gib(host, 0)}: --ram gives another")
    size = parse_bytes(options.vram) if options.vram is not None else found.memory_bytes
    assert size is not None, "a profile without the size of its memory"
    memory = Memory(int(size * SHARE), int(host * SHARE))
    device, cards = torch.device("cuda"), range(found.cards)
    place = Place(device, memory)
    if found.cards > 1:
        each = tuple(Card(n, torch.device("cuda", n), memory.device) for n in cards)
        place = Place(device, Memory(memory.device * found.cards, memory.ram), each)
    return Target(found, place, memory.ram, here=False, notes=tuple(notes), stand_in=note)
