"""What a user reads about the experts: counts, bytes, waiting, use of the PCIe port."""

from dataclasses import dataclass
from typing import ClassVar

from offload.cache.statistics import Figures, LayerCounts
from offload.fit import Share


@dataclass(frozen=True)
class CardStats(Figures):
    """What one of several cards did."""

    FIXED: ClassVar[frozenset[str]] = frozenset({"share"})

    share: Share
    counts: LayerCounts
    bytes_copied: int
    link_busy_seconds: float

    def __repr__(self) -> str:
        return (
            f"CardStats(card {self.share.number}, {self.share.slots}/{self.share.experts} slots, "
            f"hits {self.counts.hit_rate:.1%})"
        )

    def line(self) -> str:
        """The card's line, printed under the line of all experts."""
        rate = self.bytes_copied / 1e9 / self.link_busy_seconds if self.link_busy_seconds else 0.0
        return (
            f"[ GPU {self.share.number}: {len(self.share.blocks)} layers | "
            f"{self.share.slots} of {self.share.experts} experts in memory | "
            f"hits {self.counts.hit_rate:.1%} | link {rate:.1f} GB/s ]"
        )


@dataclass(frozen=True)
class Stats(Figures):
    """What happened up to a moment; subtract an earlier one for what happened in between."""

    FIXED: ClassVar[frozenset[str]] = frozenset({"slots", "total_experts"})

    counts: LayerCounts
    layers: tuple[LayerCounts, ...]
    slots: int
    total_experts: int
    bytes_loaded: int
    link_busy_seconds: float
    tokens: int  # tokens that went through the model
    cards: tuple[CardStats, ...] = ()  # where there are several
    bytes_in_place: int = 0  # loaded bytes that were not copied, but read where they are mapped

    def __repr__(self) -> str:
        return (
            f"Stats({self.slots}/{self.total_experts} slots, hits {self.counts.hit_rate:.1%}, "
            f"{self.mib_per_token:.1f} MiB/token)"
        )

    @property
    def bytes_copied(self) -> int:
        """Bytes that went over the link."""
        return self.bytes_loaded - self.bytes_in_place

    @property
    def mib_per_token(self) -> float:
        return self.bytes_loaded / 2**20 / self.tokens if self.tokens else 0.0

    @property
    def link_gb_per_s(self) -> float:
        """Rate of the copies while they ran; 0 when there were none."""
        return self.bytes_copied / 1e9 / self.link_busy_seconds if self.link_busy_seconds else 0.0

    def residency(self) -> str:
        """How many experts the slots hold."""
        return f"{self.slots} of {self.total_experts} experts in memory"

    def line(self) -> str:
        """The line about experts after an answer, and one more for each of several cards."""
        counts = self.counts
        parts = [f"Experts: {self.slots} of {self.total_experts} in memory"]
        if counts.requests:
            ahead = f"{counts.lookahead_precision:.0%}" if counts.lookahead_guesses else "off"
            parts += [
                f"hits {counts.hit_rate:.1%}",
                f"{self.mib_per_token:.1f} MiB/token",
                f"look-ahead {ahead}",
            ]
        return "\n".join([f"[ {' | '.join(parts)} ]", *(card.line() for card in self.cards)])
