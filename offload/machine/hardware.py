"""How fast machines are: rates of the published graphics cards, and the class that measuring fills.

PCIe rates are the raw rates of the lanes after 128b/130b coding (PCI-SIG).
"""

import math
import re
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from offload.errors import BudgetError
from offload.machine.cards import CARDS, OTHERS, Card

LANE_GB_PER_S = {3: 15.75 / 16, 4: 31.51 / 16, 5: 63.02 / 16}  # PCIe generation -> one way
# The share of the raw rate that copies from pinned memory reach. nvbandwidth gave 24 to 26 GB/s of
# 31.5 on RTX 4090s (issue 15 of NVIDIA/nvbandwidth), and 56 of 63 on RTX 5090s (issue 29 of
# tinygrad/open-gpu-kernel-modules).
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


def _profile(card: Card) -> Hardware:
    """What programs reach on `card`, with the RAM that is usual beside it."""
    ram = DDR5_6000_X2 if card.compute > 8.6 else DDR4_3200_X2
    return Hardware(
        card.name,
        memory_gb_per_s=card.gb_per_s * MEMORY_SHARE,
        link_gb_per_s=LANE_GB_PER_S[card.pcie] * card.lanes * PINNED_SHARE,
        ram_gb_per_s=DDR4_3200_X8 if card.compute in SERVERS else ram,
        memory_bytes=card.gib * 2**30,
    )


SERVERS = (8.0, 9.0)  # the compute capabilities of cards that are built into servers alone
PROFILES: dict[str, Hardware] = {card.name: _profile(card) for card in CARDS}
_MEMORY = re.compile(r"(\d+)\s*gi?b\b")
_LEFT_OUT = re.compile(
    r"nvidia|geforce|quadro|radeon|amd|intel|gpu|generation|blackwell|\brtx|\bgtx|\brx|[\s_()-]"
)


def _plain(name: str) -> tuple[str, int | None]:
    """A card's name without what people leave out, and the GiB of memory that it may have."""
    text = name.casefold().replace("mobile", "laptop")
    size = _MEMORY.search(text)
    return _LEFT_OUT.sub("", _MEMORY.sub("", text)), int(size[1]) if size else None


def find_hardware(name: str) -> Hardware | None:
    """The profile called `name`, or None if there is none.

    Case, spaces and hyphens make no difference, and "NVIDIA", "GeForce" and "RTX" may be left out.
    A size of memory at the end, as in "4060 Ti 16GB", tells cards of one name apart. "2x4090" means
    two of these cards.
    """
    several = re.fullmatch(r"(\d+)\s*x\s*(.+)", name.strip(), re.IGNORECASE)
    if several and (one := find_hardware(several[2])) is not None:
        return replace(one, cards=max(1, int(several[1])))
    card = _find(CARDS, name)
    return PROFILES[card.name] if card else None


def asked_hardware(name: str, memory_bytes: int | None) -> tuple[Hardware, str]:
    """The profile for a card called `name`, and a note if it is another card's, else "".

    `memory_bytes`: the size of its memory, if the user gave it. Raises `BudgetError`.
    """
    if (found := find_hardware(name)) is not None:
        return found, ""
    if (nearest := nearest_hardware(name, memory_bytes)) is None:
        raise BudgetError(
            f"unknown GPU {name!r}: write a name like 4070, '4060 Ti 16GB' or 'RTX A5000', or give "
            "the memory of the GPU with --vram"
        )
    return nearest


def _find(cards: tuple[Card, ...], name: str) -> Card | None:
    wanted, gib = _plain(name)
    same = [card for card in cards if wanted and _plain(card.name)[0] == wanted]
    return next((card for card in same if gib in (None, card.gib)), None)


def nearest_hardware(name: str, memory_bytes: int | None) -> tuple[Hardware, str] | None:
    """A profile to take for a card that has none, and a sentence that says so.

    A card that cannot run models takes the nearest by memory and bandwidth; any other takes a card
    of the same number, else the nearest by `memory_bytes`. None if nothing is known of the card.
    """
    wanted, gib = _plain(name)
    size = memory_bytes / 2**30 if memory_bytes else gib
    if other := _find(OTHERS, name):
        card = min(CARDS, key=lambda card: _distance(card, other.gib, other.gb_per_s))
        why = f"offload does not run on a {other.name}, which has no CUDA that torch supports"
        near_to = f"the GPU nearest to its {other.gib} GiB and {other.gb_per_s:.0f} GB/s"
        found = replace(PROFILES[card.name], memory_bytes=other.gib * 2**30)
        return found, f"{why}: the figures are those of the {card.name}, {near_to}"
    number = re.search(r"\d{4}", wanted)  # it names the card; the words after it are variants
    alike = {
        card: (len(plain) * wanted.startswith(plain), SequenceMatcher(None, wanted, plain).ratio())
        for card in CARDS
        if number and number[0] in (plain := _plain(card.name)[0])
    }
    if not alike and size is None:
        return None
    near = [card for card, ratio in alike.items() if ratio == max(alike.values())] or CARDS
    card = min(near, key=lambda card: _distance(card, size or card.gib, None))
    found = PROFILES[card.name]
    if size is not None:
        found = replace(found, memory_bytes=round(size * 2**30))
    told = f"with {size:g} GiB" if size is not None else f"with its {card.gib} GiB"
    return found, f"no GPU is known as {name!r}: the figures are those of the {card.name}, {told}"


def _distance(card: Card, gib: float, gb_per_s: float | None) -> float:
    """How far `card` is from a card of these figures, by the ratios of both."""
    apart = abs(math.log(card.gib / gib))
    return apart + (abs(math.log(card.gb_per_s / gb_per_s)) if gb_per_s else 0.0)
