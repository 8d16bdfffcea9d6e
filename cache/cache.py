"""The expert cache: decides hits, loads, evictions, waves and look-ahead loads.

Knows: which keys are resident, in use and on their way. Does not know: bytes, tensors, clocks,
threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache.plan import Plan, Use, Wave
from cache.policy import Key, Policy
from cache.slots import SlotTable
from cache.statistics import Statistics


class ExpertCache:
    """Slots shared by all layers under one policy.

    `plan` is called once a step; the slots of that plan are in use until the next call. Slots being
    filled by look-ahead are *in flight* from `look_ahead` until `landed`. Neither is ever evicted.
    """

    def __init__(self, slots: int, layers: int, policy: Policy) -> None:
        self.table = SlotTable(slots)
        self.statistics = Statistics(layers)
        self._policy = policy
        self._held = [0] * layers  # resident keys of each layer
        self._share = max(1, slots // layers)
        self._in_use: frozenset[Key] = frozenset()
        self._in_flight: set[int] = set()
        self._guesses: dict[int, frozenset[int]] = {}  # layer -> experts guessed for its next step
        self._guess_loads: dict[int, frozenset[int]] = {}  # layer -> those of them that were loaded

    def plan(self, layer: int, experts: Sequence[int]) -> Plan:
        """Decide how the distinct `experts` of `layer` are served.

        Residents come first. What does not fit beside them waits for a later wave, which takes over
        the slots of the wave before it.
        """
        counts = self.statistics.layers[layer]
        guessed = self._guesses.pop(layer, None)
        if guessed is not None:
            counts.lookahead_asked += len(experts)
            counts.lookahead_right += len(guessed.intersection(experts))
            loaded = self._guess_loads.pop(layer, frozenset())
            counts.lookahead_loads_right += len(loaded.intersection(experts))
        keys = [(layer, expert) for expert in experts]
        self._in_use = frozenset(keys)
        hits, missing = [], []
        for key in keys:
            if key in self.table:
                self._policy.use(key)
                hits.append(Use(key[1], self.table.slot_of(key)))
            else:
                missing.append(key)
        counts.requests += len(keys)
        counts.hits += len(hits)
        counts.misses += len(missing)
        waves = []
        done: list[Use] = hits  # uses whose slots the next wave may take over
        first_hits = tuple(hits)
        while missing or first_hits:
            loads = self._take_slots(layer, missing)
            if not loads and not first_hits:
                loads = self._take_over(layer, done, missing)
            waves.append(Wave(first_hits, tuple(loads)))
            done = [*first_hits, *loads]
            first_hits = ()
            missing = missing[len(loads) :]
        return Plan(layer, tuple(waves))

    def _take_slots(self, layer: int, keys: Sequence[Key]) -> list[Use]:
        """Place as many of `keys` as there are free or evictable slots."""
        placed: list[Use] = []
        for key in keys:
            slot = self._free_slot(layer)
            if slot is None:
                break
            self._place(key, slot)
            placed.append(Use(key[1], slot))
        return placed

    def _take_over(self, layer: int, done: Sequence[Use], keys: Sequence[Key]) -> list[Use]:
        """Place `keys` in the slots of uses that are over."""
        placed = []
        for use, key in zip(done, keys, strict=False):
            self._evict(layer, (layer, use.expert))
            self._place(key, use.slot)
            placed.append(Use(key[1], use.slot))
        assert placed, "a wave without a slot"
        return placed

    def look_ahead(self, layer: int, experts: Sequence[int], most: int) -> tuple[Use, ...]:
        """Choose which guessed `experts` of a later `layer` to load now, at most `most` of them.

        Evicts neither what is in use, in flight or guessed, and always leaves one slot that `plan`
        can have at once.
        """
        guessed = frozenset(experts)
        self._guesses[layer] = guessed
        counts = self.statistics.layers[layer]
        counts.lookahead_guesses += len(guessed)
        loads: list[Use] = []
        keys = [(layer, expert) for expert in experts]
        missing = []
        for key in keys:
            if key in self.table:
                self._policy.use(key)  # not to be evicted before it is asked for
            else:
                missing.append(key)
        for key in missing:
            if len(loads) >= most or len(self._in_flight) + 1 >= self.table.slots:
                break
            slot = self._free_slot(layer, keys)
            if slot is None:
                break
            self._place(key, slot)
            self._in_flight.add(slot)
            loads.append(Use(key[1], slot))
        self._guess_loads[layer] = frozenset(use.expert for use in loads)
        counts.lookahead_loads += len(loads)
        return tuple(loads)

    def in_flight(self) -> tuple[int, ...]:
        """Slots of look-ahead loads that have not landed."""
        return tuple(self._in_flight)

    def landed(self, slot: int) -> None:
        """The look-ahead load into `slot` is complete."""
        self._in_flight.discard(slot)

    def clear(self) -> None:
        """Forget what is where; counts stay. For a step that broke off at any point."""
        self.table = SlotTable(self.table.slots)
        self._policy.clear()
        self._held = [0] * len(self._held)
        self._in_use = frozenset()
        self._in_flight.clear()
        self._guesses.clear()
        self._guess_loads.clear()
        for counts in self.statistics.layers:
            counts.requests = counts.hits + counts.misses

    def is_resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self.table

    def _free_slot(self, layer: int, keep: Sequence[Key] = ()) -> int | None:
        """A slot for a key of `layer`: a free one, else that of the policy's first fitting victim.

        A layer that holds more than its share gives first, as does `layer` itself once it has its
        share: under plain LRU over layers that are used in turn, the least recently used key is the
        one that is about to be used.
        """
        slot = self.table.take_free()
        if slot is not None:
            return slot
        fallback = None
        for key in self._policy.victims():
            if key in self._in_use or key in keep or self.table.slot_of(key) in self._in_flight:
                continue
            held = self._held[key[0]]
            if held > self._share or (key[0] == layer and held == self._share):
                return self._evict(layer, key)
            fallback = fallback or key
        return None if fallback is None else self._evict(layer, fallback)

    def _evict(self, layer: int, key: Key) -> int:
        self.statistics.layers[layer].evictions += 1
        return self._remove(key)

    def _remove(self, key: Key) -> int:
        self._policy.remove(key)
        self._held[key[0]] -= 1
        return self.table.remove(key)

    def _place(self, key: Key, slot: int) -> None:
        self.table.put(key, slot)
        self._held[key[0]] += 1
        self._policy.insert(key)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other."""
        self.table.check_integrity()
        assert len(self._in_flight) < self.table.slots or self.table.slots == 1, "all in flight"
        for slot in self._in_flight:
            assert self.table.key_in(slot) is not None, f"nothing is on its way to slot {slot}"
        order = list(self._policy.victims())
        assert len(order) == len(self.table), "policy and table disagree"
        assert all(key in self.table for key in order), (
            "the policy orders a key that is not resident"
        )
        held = [sum(key[0] == layer for key in order) for layer in range(len(self._held))]
        assert held == self._held, "resident keys of a layer are miscounted"
        for counts in self.statistics.layers:
            assert counts.hits + counts.misses == counts.requests
