"""What engines, replays and pictures ask of a cache, be it one or one for each card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from offload.cache.decision import Decision, Use
from offload.cache.heat import Heat
from offload.cache.policies import Key
from offload.cache.statistics import Statistics


class Slots(Protocol):
    """Which key is in which slot, to be read only."""

    @property
    def slots(self) -> int:
        """How many there are."""

    def __len__(self) -> int:
        """How many hold a key."""

    def has_free(self) -> bool:
        """Whether a key could be loaded without evicting another."""

    def key_in(self, slot: int) -> Key | None:
        """The key that is in `slot`."""


class Cache(Protocol):
    """Decides hits, loads and evictions; see `cache.cache.ExpertCache`."""

    least_slots: int  # with fewer nothing can be computed

    @property
    def table(self) -> Slots:
        """What is resident."""

    @property
    def statistics(self) -> Statistics:
        """What happened, layer by layer."""

    @property
    def heat(self) -> Heat:
        """What was used lately, layer by layer."""

    def decide(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        prompt: bool = False,
        admit: int | None = None,
    ) -> Decision:
        """Decide how the distinct `experts` of `layer` are served."""

    def look_ahead(self, layer: int, experts: Sequence[int], most: int) -> tuple[Use, ...]:
        """Choose which guessed `experts` of a later `layer` to load now."""

    def warm(self, layer: int, expert: int) -> Use | None:
        """Load an expert that was hot in an earlier run, if there is a free slot."""

    def forget(self) -> None:
        """Begin anew; heat and counts stay."""

    def resize(self, slots: int) -> None:
        """Have `slots` from now on, all of them empty."""

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether the expert has a slot."""

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other."""
