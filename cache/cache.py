"""The expert cache: decides hits, loads, evictions, waves and look-ahead loads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import NamedTuple

from offload.cache.decision import Decision, Use, Wave
from offload.cache.eviction import LayerPools
from offload.cache.guesses import Trust
from offload.cache.heat import Heat, LayerHeat
from offload.cache.policies import Key, Policy, PoolState
from offload.cache.slots import SlotTable
from offload.cache.statistics import LayerCounts, Statistics

PROMPT_WEIGHT = 0.25  # weight of a use by a prompt; a use by a generated token counts 1


class CacheState(NamedTuple):
    """All that decisions depend on between two tokens, when nothing is in use or guessed."""

    keys: tuple[Key | None, ...]  # by slot; None: free
    pools: tuple[PoolState, ...]  # of each layer
    useless: tuple[Key, ...]  # the first to leave, in order
    trust: tuple[float, ...]  # in each layer's guesses
    heat: tuple[LayerHeat, ...]  # of each layer


class ExpertCache:
    """Slots that all layers share under one eviction policy.

    `decide` is called once a step. The experts it names are in use until the next call, and the
    experts that `look_ahead` names stay until the step they were guessed for: neither are evicted
    meanwhile. The same calls lead to the same decisions, in a live run and in a replay.
    """

    def __init__(
        self,
        slots: int,
        layers: int,
        policy: Callable[[], Policy],
        pools: Callable[[int, Callable[[], Policy]], LayerPools] = LayerPools,
    ) -> None:
        """Raises `ValueError` for fewer than one slot. `pools` is another than `LayerPools` only in
        replays that compare ways to choose a victim."""
        self.table = SlotTable(slots)
        self.least_slots = 1  # without a slot nothing can be computed
        self.statistics = Statistics([LayerCounts() for _ in range(layers)])
        self.heat = Heat([LayerHeat() for _ in range(layers)])
        self._new_pools = functools.partial(pools, layers, policy)
        self._pools = self._new_pools()
        self._trust = Trust(layers)
        self._keep: set[Key] = set()  # keys in use, and guessed ones that are resident
        self._in_use: list[Key] = []
        self._guesses: dict[int, _Guess] = {}  # layer -> what was guessed for its next step
        # Keys that a wrong guess loaded and nobody asked for since: the first to leave, in order.
        self._useless: dict[Key, None] = {}

    def decide(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        prompt: bool = False,
        admit: int | None = None,
    ) -> Decision:
        """Decide how the distinct `experts` of `layer` are served.

        Residents come first. Misses among the last `admit` of `experts` may evict other experts;
        the rest get free slots as long as there are any, and are streamed otherwise. With
        `admit` None all misses may evict, and misses that do not fit wait for a later wave, which
        takes over the slots of the wave before it.
        """
        self._release()
        weight = PROMPT_WEIGHT if prompt else 1.0
        self.heat.use(layer, experts, weight)
        guess = self._guesses.pop(layer, None)
        if guess is not None:
            self._judge(layer, guess, experts)
        keys = [(layer, expert) for expert in experts]
        hits: list[Use] = []
        missing: list[Key] = []
        for key, use in zip(keys, self.table.uses_of(keys), strict=True):
            if use is None:
                missing.append(key)
            else:
                hits.append(use)
                self._in_use.append(key)
        self._keep.update(self._in_use)
        self._pools.use(layer, self._in_use, weight)
        if self._useless:
            for key in self._in_use:
                self._useless.pop(key, None)
        counts = self.statistics.layers[layer]
        counts.requests += len(experts)
        counts.hits += len(hits)
        counts.misses += len(missing)
        if not missing:
            return Decision(layer, (Wave(tuple(hits), ()),) if hits else ())
        if admit is None:
            return Decision(layer, self._waves(layer, hits, missing, weight))
        last = set(keys[max(0, len(keys) - admit) :])
        loads = self._admit(layer, missing, last, weight)
        placed = {use.expert for use in loads}
        streamed = tuple(expert for _, expert in missing if expert not in placed)
        counts.streamed += len(streamed)
        waves = (Wave(tuple(hits), loads),) if hits or loads else ()
        return Decision(layer, waves, streamed)

    def _admit(
        self, layer: int, missing: list[Key], last: set[Key], weight: float
    ) -> tuple[Use, ...]:
        """Load the `missing` keys that may evict (`last`) and those that find room without.

        Where slots are few, keys of `last` come before the others, and later keys before earlier.
        """
        slots = self._take_slots(layer, len(missing), evict=sum(key in last for key in missing))
        wanted = sorted(missing, key=last.__contains__)  # those of `last` come last
        taken = wanted[len(wanted) - len(slots) :]
        self._in_use += taken
        self._keep.update(taken)
        return self._place(layer, taken, slots, weight)

    def _release(self) -> None:
        """End the previous step: the keys that it used may be evicted again."""
        if self._in_use:
            self._keep.difference_update(self._in_use)
            self._pools.changed(self._in_use[0][0])
            self._in_use.clear()

    def _judge(self, layer: int, guess: _Guess, experts: Sequence[int]) -> None:
        """Compare the guess made for this step with the experts the step asks for."""
        counts = self.statistics.layers[layer]
        right = guess.experts.intersection(experts)
        absent_right = guess.absent.intersection(experts)
        counts.lookahead_guesses += len(guess.experts)
        counts.lookahead_asked += len(experts)
        counts.lookahead_right += len(right)
        counts.lookahead_loads_right += len(guess.loaded.intersection(experts))
        self._trust.learn(layer, len(absent_right), len(guess.absent) - len(absent_right))
        self._keep.difference_update((layer, expert) for expert in guess.experts)
        self._useless.update(guess.useless(layer, guess.loaded - right))

    def _waves(
        self, layer: int, hits: list[Use], missing: list[Key], weight: float
    ) -> tuple[Wave, ...]:
        """The waves of a step whose misses may all evict."""
        waves = []
        done = hits  # uses whose slots the next wave may take over
        first_hits = tuple(hits)
        while missing or first_hits:
            slots = self._take_slots(layer, len(missing), evict=len(missing))
            if not slots and not first_hits:
                slots = self._take_over(layer, done[: len(missing)])
            taken, missing = missing[: len(slots)], missing[len(slots) :]
            loads = self._place(layer, taken, slots, weight)
            self._in_use += taken
            self._keep.update(taken)
            waves.append(Wave(first_hits, loads))
            if missing:
                done = [*first_hits, *loads]
            first_hits = ()
        return tuple(waves)

    def _take_slots(self, layer: int, count: int, *, evict: int) -> list[int]:
        """At most `count` slots for keys of `layer`.

        Free slots come first, then those of useless keys, then as many victims' slots as are
        needed for `evict` slots in all.
        """
        slots: list[int] = []
        while len(slots) < count and (slot := self.table.take_free()) is not None:
            slots.append(slot)
        if len(slots) < count and self._useless:
            useless = [key for key in self._useless if key not in self._keep]
            slots += self._evict(layer, useless[: count - len(slots)])
        if len(slots) < evict:
            victims = self._pools.evict(layer, evict - len(slots), self._keep)
            slots += self._vacate(layer, victims)
        return slots

    def _take_over(self, layer: int, done: Sequence[Use]) -> list[int]:
        """The slots of the uses in `done`, which are over."""
        keys = [(layer, use.expert) for use in done]
        assert keys, "a wave without a slot"
        self._in_use = [key for key in self._in_use if key not in keys]
        self._keep.difference_update(keys)
        return self._evict(layer, keys)

    def look_ahead(self, layer: int, experts: Sequence[int], most: int) -> tuple[Use, ...]:
        """Choose which guessed `experts` of a later `layer` to load now, at most `most` of them.

        Keys that are in use or guessed are not evicted, and one slot is always left that `decide`
        can have at once. A layer whose guesses rarely come true evicts nothing useful.
        """
        guess = _Guess(experts)
        self._replace_guess(layer, guess)
        absent = [(layer, expert) for expert in experts if (layer, expert) not in self.table]
        guess.absent |= {key[1] for key in absent}
        self._pools.changed(layer)
        if not self._trust.may_load(layer):
            return ()
        spare = self.table.slots - 1 - (len(self._keep) - len(self._in_use))
        for expert in experts:
            key = (layer, expert)
            if spare > 0 and key in self.table and key not in self._keep:
                self._keep.add(key)  # the expert must not leave before its step
                spare -= 1
        count = min(most, len(absent), spare)
        if count < 1:
            return ()
        evict = count if self._trust.may_evict(layer) else 0
        slots = self._take_slots(layer, count, evict=evict)
        loads = self._place(layer, absent[: len(slots)], slots, 0.0)
        guess.loaded |= {use.expert for use in loads}
        self._keep.update((layer, use.expert) for use in loads)
        self.statistics.layers[layer].lookahead_loads += len(loads)
        return loads

    def _replace_guess(self, layer: int, guess: _Guess) -> None:
        """Note `guess` for the next step of `layer`.

        An earlier guess for the same step is replaced, for example when a forward pass broke off
        between two layers. What it loaded is useless unless it is guessed again.
        """
        before = self._guesses.get(layer)
        self._guesses[layer] = guess
        if before is None:
            return
        self._keep.difference_update((layer, expert) for expert in before.experts)
        self._keep.update(self._in_use)
        guess.absent = before.absent
        guess.loaded = before.loaded & guess.experts
        self._keep.update((layer, expert) for expert in guess.loaded)
        self._useless.update(before.useless(layer, before.loaded - guess.experts))

    def warm(self, layer: int, expert: int) -> Use | None:
        """Load an expert that was hot in an earlier run, if there is a free slot."""
        if self.is_resident(layer, expert) or (slot := self.table.take_free()) is None:
            return None
        self.statistics.layers[layer].warm_loads += 1
        return self._place(layer, [(layer, expert)], [slot], 1.0)[0]

    def forget(self) -> None:
        """Begin anew with empty slots, also after a step that broke off at any point.

        Only counts and heat stay.
        """
        self.resize(self.table.slots)

    def resize(self, slots: int) -> None:
        """Have `slots` slots from now on, all of them empty; only counts and heat stay."""
        self.table = SlotTable(slots)
        self._pools.clear()  # Belady's policy is one object, also in the new pools
        self._pools = self._new_pools()
        self._trust = Trust(len(self.heat.layers))
        self._keep.clear()
        self._in_use.clear()
        self._guesses.clear()
        self._useless.clear()
        for counts in self.statistics.layers:
            counts.requests = counts.hits + counts.misses

    def is_resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self.table

    def _evict(self, layer: int, keys: Sequence[Key]) -> list[int]:
        """The slots of `keys`, which make way for keys of `layer`."""
        for key in keys:
            self._pools.remove(key)
        return self._vacate(layer, keys)

    def _vacate(self, layer: int, keys: Sequence[Key]) -> list[int]:
        """The slots of `keys`, which have left the pools to make way for keys of `layer`."""
        self.statistics.layers[layer].evictions += len(keys)
        if self._useless:
            for key in keys:
                self._useless.pop(key, None)
        return [self.table.remove(key) for key in keys]

    def _place(
        self, layer: int, keys: Sequence[Key], slots: Sequence[int], weight: float
    ) -> tuple[Use, ...]:
        """Put `keys` of `layer` into as many slots."""
        self._pools.insert(layer, keys, slots, weight)
        put = self.table.put
        return tuple([put(key, slot) for key, slot in zip(keys, slots, strict=True)])

    def state(self) -> CacheState:
        """Everything that decisions depend on, between two tokens; counts are not part of it."""
        self._release()
        assert not self._keep, "a token is under way"
        return CacheState(
            tuple(self.table.key_in(slot) for slot in range(self.table.slots)),
            self._pools.states(),
            tuple(self._useless),
            tuple(self._trust.mean),
            tuple(replace(at, uses=dict(at.uses)) for at in self.heat.layers),
        )

    def adopt(self, state: CacheState) -> None:
        """Go on from `state`, which this cache or another one came to."""
        self._keep.clear()
        self._in_use.clear()
        self._guesses.clear()
        self.table.adopt(state.keys)
        slots = {key: slot for slot, key in enumerate(state.keys) if key is not None}
        self._pools.adopt(state.pools, slots)
        self._useless = dict.fromkeys(state.useless)
        self._trust.mean = list(state.trust)
        self.heat.adopt(state.heat)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other."""
        self.table.check_integrity()
        assert sorted(self._pools.keys()) == sorted(self.table.keys()), "pools and table disagree"
        guessed = {(at, expert) for at, guess in self._guesses.items() for expert in guess.experts}
        assert self._keep <= {*self._in_use, *guessed}, "a key is kept for no reason"
        assert all(key in self.table for key in self._keep), "a key to be kept is gone"
        assert all(key in self.table for key in self._useless), "a useless key is gone"
        for counts in self.statistics.layers:
            assert counts.hits + counts.misses == counts.requests


class _Guess:
    """The experts guessed for a layer's next step."""

    __slots__ = ("absent", "experts", "loaded", "order")

    def __init__(self, experts: Sequence[int]) -> None:
        self.order = experts  # likeliest first
        self.experts = frozenset(experts)
        self.absent: frozenset[int] = frozenset()  # not resident when they were guessed
        self.loaded: frozenset[int] = frozenset()  # and then loaded for the guess

    def useless(self, layer: int, experts: Container[int]) -> dict[Key, None]:
        """The keys of `experts`, in the order of the guess; their load was for nothing."""
        return {(layer, expert): None for expert in self.order if expert in experts}
