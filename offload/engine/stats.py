"""What a user reads about the experts: counts, bytes, waiting, link use.

Knows: how to turn counters into figures. Does not know: how they were counted (`cache.statistics`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload.cache.statistics import LayerCounts
from offload.fit import Share


@dataclass(frozen=True)
class CardStats:
    """What one of several cards did."""

    share: Share
    counts: LayerCounts
    bytes_copied: int
    link_busy_seconds: float

    def __add__(self, other: CardStats) -> CardStats:
        return CardStats(
            self.share,
            self.counts + other.counts,
            self.bytes_copied + other.bytes_copied,
            self.link_busy_seconds + other.link_busy_seconds,
        )

    def __sub__(self, other: CardStats) -> CardStats:
        return CardStats(
            self.share,
            self.counts - other.counts,
            self.bytes_copied - other.bytes_copied,
            self.link_busy_seconds - other.link_busy_seconds,
        )

    def line(self) -> str:
        """A line for each card, under the one of all."""
        rate = self.bytes_copied / 1e9 / self.link_busy_seconds if self.link_busy_seconds else 0.0
        return (
            f"[ Card {self.share.number}: {len(self.share.blocks)} layers | "
            f"{self.share.slots} slots for {self.share.experts} | "
            f"hits {self.counts.hit_rate:.1%} | link {rate:.1f} GB/s ]"
        )


@dataclass(frozen=True)
class Stats:
    """A moment's figures; `a - b` are those of the time between two moments, `a + b` of two
    times."""

    counts: LayerCounts
    layers: tuple[LayerCounts, ...]
    slots: int
    total_experts: int
    bytes_loaded: int
    link_busy_seconds: float
    tokens: int  # tokens that went through the model
    cards: tuple[CardStats, ...] = ()  # where there are several
    bytes_in_place: int = 0  # of those loaded, what no link was needed for: read where it is mapped

    def __add__(self, other: Stats) -> Stats:
        return replace(
            self,
            counts=self.counts + other.counts,
            layers=tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)),
            cards=tuple(a + b for a, b in zip(self.cards, other.cards, strict=True)),
            bytes_loaded=self.bytes_loaded + other.bytes_loaded,
            link_busy_seconds=self.link_busy_seconds + other.link_busy_seconds,
            tokens=self.tokens + other.tokens,
            bytes_in_place=self.bytes_in_place + other.bytes_in_place,
        )

    def __sub__(self, other: Stats) -> Stats:
        return replace(
            self,
            counts=self.counts - other.counts,
            layers=tuple(a - b for a, b in zip(self.layers, other.layers, strict=True)),
            cards=tuple(a - b for a, b in zip(self.cards, other.cards, strict=True)),
            bytes_loaded=self.bytes_loaded - other.bytes_loaded,
            link_busy_seconds=self.link_busy_seconds - other.link_busy_seconds,
            tokens=self.tokens - other.tokens,
            bytes_in_place=self.bytes_in_place - other.bytes_in_place,
        )

    @property
    def bytes_copied(self) -> int:
        """What went over the link."""
        return self.bytes_loaded - self.bytes_in_place

    @property
    def mib_per_token(self) -> float:
        return self.bytes_loaded / 2**20 / self.tokens if self.tokens else 0.0

    @property
    def link_gb_per_s(self) -> float:
        """Rate of the copies while they ran; 0 when there were none."""
        return self.bytes_copied / 1e9 / self.link_busy_seconds if self.link_busy_seconds else 0.0

    def line(self) -> str:
        """The experts' line printed after an answer; one more for each of several cards."""
        counts = self.counts
        text = (
            f"[ Experts: {self.slots} slots for {self.total_experts} | "
            f"hits {counts.hit_rate:.1%} | {self.mib_per_token:.1f} MiB/token"
        )
        if counts.lookahead_guesses:
            text += (
                f" | look-ahead precision {counts.lookahead_precision:.0%}, "
                f"recall {counts.lookahead_recall:.0%}"
            )
        return "\n".join([text + " ]", *(card.line() for card in self.cards)])
