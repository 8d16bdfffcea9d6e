"""One cache for each card, behind the interface of one cache.

A layer's experts live on the layer's card and compete only with those of the card's other layers.
Row r of card c, of n cards, is slot r * n + c, so a slot keeps its number when a card gets more or
fewer rows.
"""

from collections.abc import Sequence
from itertools import pairwise

from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision, Use, Wave
from offload.cache.heat import Heat
from offload.cache.policies import Key
from offload.cache.statistics import Statistics


def card_and_row(slot: int, cards: int) -> tuple[int, int]:
    """The card and the row of `slot`."""
    row, card = divmod(slot, cards)
    return card, row


def divided(slots: int, had: Sequence[int]) -> list[int]:
    """Slots for each card: one each, and the rest in the proportions that the cards `had`."""
    assert len(had) <= slots <= sum(had), "a card without slots, or with more than before"
    more, rest = sum(had) - len(had), slots - len(had)
    ends = [rest * (sum(had[:at]) - at) // max(1, more) for at in range(len(had) + 1)]
    return [1 + end - begin for begin, end in pairwise(ends)]


class ShardedCache:
    """The interface of `ExpertCache` over one for each card; the cards have the layers in turn."""

    def __init__(self, caches: Sequence[ExpertCache]) -> None:
        self.caches = tuple(caches)
        self.least_slots = len(self.caches)
        self.table = _Table(self.caches)
        self._had = tuple(cache.table.slots for cache in caches)  # `resize` keeps these proportions
        # Views of the cards' layers: what a card counts shows here, and back.
        self.statistics = Statistics([at for cache in caches for at in cache.statistics.layers])
        self.heat = Heat([at for cache in caches for at in cache.heat.layers])
        sizes = [len(cache.heat.layers) for cache in caches]
        # For each layer of the model its card and its number there
        self._at = [(card, layer) for card, size in enumerate(sizes) for layer in range(size)]

    def decide(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        prompt: bool = False,
        admit: int | None = None,
    ) -> Decision:
        card, local = self._at[layer]
        decision = self.caches[card].decide(local, experts, prompt=prompt, admit=admit)
        waves = (
            Wave(self._numbered(card, wave.hits), self._numbered(card, wave.loads))
            for wave in decision.waves
        )
        return decision._replace(layer=layer, waves=tuple(waves))

    def look_ahead(self, layer: int, experts: Sequence[int], most: int) -> tuple[Use, ...]:
        card, local = self._at[layer]
        return self._numbered(card, self.caches[card].look_ahead(local, experts, most))

    def warm(self, layer: int, expert: int) -> Use | None:
        card, local = self._at[layer]
        use = self.caches[card].warm(local, expert)
        return None if use is None else self._numbered(card, (use,))[0]

    def forget(self) -> None:
        for cache in self.caches:
            cache.forget()

    def resize(self, slots: int) -> None:
        for cache, count in zip(self.caches, divided(slots, self._had), strict=True):
            cache.resize(count)

    def is_resident(self, layer: int, expert: int) -> bool:
        card, local = self._at[layer]
        return self.caches[card].is_resident(local, expert)

    def check_integrity(self) -> None:
        for cache in self.caches:
            cache.check_integrity()

    def _numbered(self, card: int, uses: Sequence[Use]) -> tuple[Use, ...]:
        cards = len(self.caches)
        return tuple([Use(expert, row * cards + card) for expert, row in uses])


class _Table:
    """The tables of all cards as one. They are read anew each time: a cache may replace its own."""

    def __init__(self, caches: tuple[ExpertCache, ...]) -> None:
        self._caches = caches

    @property
    def slots(self) -> int:
        return sum(cache.table.slots for cache in self._caches)

    def __len__(self) -> int:
        return sum(len(cache.table) for cache in self._caches)

    def has_free(self) -> bool:
        return any(cache.table.has_free() for cache in self._caches)

    def key_in(self, slot: int) -> Key | None:
        card, row = card_and_row(slot, len(self._caches))
        key = self._caches[card].table.key_in(row)
        if key is None:
            return None
        before = sum(len(cache.heat.layers) for cache in self._caches[:card])
        return before + key[0], key[1]


Cache = ExpertCache | ShardedCache  # what engines, replays and pictures ask: one card or several
