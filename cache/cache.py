"""The expert cache: decides hits, loads, evictions, waves and look-ahead loads.

Knows: which keys are resident, in use and guessed. Does not know: bytes, tensors, clocks, threads:
the same calls lead to the same decisions, live and in a replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence

from offload.cache.allocation import ALLOCATIONS, Allocation
from offload.cache.decision import CacheState, Decision, Use, Wave
from offload.cache.guesses import Trust
from offload.cache.heat import Heat
from offload.cache.policy import Key, Policy
from offload.cache.slots import SlotTable
from offload.cache.statistics import Statistics

PROMPT_WEIGHT = 0.25  # of a prompt's use; a generated token's counts 1


class ExpertCache:
    """Slots shared by all layers under one policy and one allocation.

    `decide` is called once a step; what it names is in use until the next call. What `look_ahead`
    named stays until the step it was guessed for. Neither is evicted meanwhile.
    """

    def __init__(
        self,
        slots: int,
        layers: int,
        policy: Callable[[], Policy],
        allocation: str = "shared",
    ) -> None:
        self.table = SlotTable(slots)
        self.least_slots = 1
        self.statistics = Statistics(layers)
        self.heat = Heat(layers)
        self._make = functools.partial(ALLOCATIONS[allocation], layers=layers, policy=policy)
        self._allocation: Allocation = self._make(slots)
        self._trust = Trust(layers)
        self._keep: set[Key] = set()  # in use, or guessed
        self._in_use: list[Key] = []
        self._guesses: dict[int, _Guess] = {}  # of a layer's next step
        self._useless: dict[Key, None] = {}  # loaded by a wrong guess, not asked for since

    def decide(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        prompt: bool = False,
        admit: int | None = None,
    ) -> Decision:
        """Decide how the distinct `experts` of `layer` are served.

        Residents come first. Of what is missing the last `admit` of `experts` may evict; the
        others get free slots, as far as there are any, or are streamed. With None all may, and what
        does not fit waits for a later wave, which takes over the slots of the wave before it.
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
        self._allocation.use(layer, self._in_use, weight)
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
        """Load what may evict, and what finds room without; the later asked for goes first."""
        slots = self._take_slots(layer, len(missing), evict=sum(key in last for key in missing))
        wanted = sorted(missing, key=last.__contains__)  # a stable sort: `last` comes last
        taken = wanted[len(wanted) - len(slots) :]
        self._in_use += taken
        self._keep.update(taken)
        return self._place(layer, taken, slots, weight)

    def _release(self) -> None:
        """The step before is over: what it used may leave again."""
        if self._in_use:
            self._keep.difference_update(self._in_use)
            self._allocation.changed(self._in_use[0][0])
            self._in_use.clear()

    def _judge(self, layer: int, guess: _Guess, experts: Sequence[int]) -> None:
        """Compare what was guessed for this step with what it asks for."""
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
        """At most `count` slots for keys of `layer`: free ones, useless ones, and as far as these
        are fewer than `evict`, victims'."""
        slots: list[int] = []
        if self.table.has_free():
            room = min(count, self._allocation.room(layer))
            while len(slots) < room and (slot := self.table.take_free()) is not None:
                slots.append(slot)
        if len(slots) < count and self._useless:
            pooled = self._allocation.pooled
            useless = [
                key
                for key in self._useless
                if key not in self._keep and (pooled or key[0] == layer)
            ]
            slots += self._evict(layer, useless[: count - len(slots)])
        if len(slots) < evict:
            victims = self._allocation.evict(layer, evict - len(slots), self._keep)
            slots += self._vacate(layer, victims)
        return slots

    def _take_over(self, layer: int, done: Sequence[Use]) -> list[int]:
        """The slots of uses that are over."""
        keys = [(layer, use.expert) for use in done]
        assert keys, "a wave without a slot"
        self._in_use = [key for key in self._in_use if key not in keys]
        self._keep.difference_update(keys)
        return self._evict(layer, keys)

    def look_ahead(self, layer: int, experts: Sequence[int], most: int) -> tuple[Use, ...]:
        """Choose which guessed `experts` of a later `layer` to load now, at most `most` of them.

        Evicts neither what is in use nor what is guessed, always leaves one slot that `decide` can
        have at once, and evicts nothing useful for a layer whose guesses do not come true.
        """
        guess = _Guess(experts)
        self._replace_guess(layer, guess)
        absent = [(layer, expert) for expert in experts if (layer, expert) not in self.table]
        guess.absent |= {key[1] for key in absent}
        if not self._trust.may_load(layer):
            return ()
        self._allocation.changed(layer)
        spare = self.table.slots - 1 - (len(self._keep) - len(self._in_use))
        for expert in experts:
            key = (layer, expert)
            if spare > 0 and key in self.table and key not in self._keep:
                self._keep.add(key)  # not to be evicted before it is asked for
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
        """A guess made later, nearer to the step, takes over what was loaded for the earlier."""
        before = self._guesses.get(layer)
        self._guesses[layer] = guess
        if before is None:
            return
        self._keep.difference_update((layer, expert) for expert in before.experts)
        self._keep.update(self._in_use)
        guess.absent = before.absent
        guess.loaded = before.loaded & guess.experts
        self._useless.update(before.useless(layer, before.loaded - guess.experts))

    def warm(self, layer: int, expert: int) -> Use | None:
        """Load an expert that was hot in an earlier run, if there is a free slot."""
        if (layer, expert) in self.table or not self._allocation.room(layer):
            return None
        slot = self.table.take_free()
        if slot is None:
            return None
        self.statistics.layers[layer].warm_loads += 1
        return self._place(layer, [(layer, expert)], [slot], 1.0)[0]

    def clear(self) -> None:
        """Forget what is where; counts stay. For a step that broke off at any point."""
        self.table = SlotTable(self.table.slots)
        self._allocation.clear()
        self._keep.clear()
        self._in_use.clear()
        self._guesses.clear()
        self._useless.clear()
        for counts in self.statistics.layers:
            counts.requests = counts.hits + counts.misses

    def forget(self) -> None:
        """`clear`, and begin anew with what was learnt about keys and guesses; heat stays."""
        self.clear()
        self._allocation = self._make(self.table.slots)
        self._trust = Trust(len(self.heat))

    def resize(self, slots: int) -> None:
        """Have `slots` from now on, all of them empty: `forget`."""
        self.table = SlotTable(slots)
        self.forget()

    def is_resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self.table

    def _evict(self, layer: int, keys: Sequence[Key]) -> list[int]:
        """The slots of `keys`, which make way for keys of `layer`."""
        for key in keys:
            self._allocation.remove(key)
        return self._vacate(layer, keys)

    def _vacate(self, layer: int, keys: Sequence[Key]) -> list[int]:
        """The slots of `keys`, which the allocation gave up for `layer`."""
        self.statistics.layers[layer].evictions += len(keys)
        if self._useless:
            for key in keys:
                self._useless.pop(key, None)
        return [self.table.remove(key) for key in keys]

    def _place(
        self, layer: int, keys: Sequence[Key], slots: Sequence[int], weight: float
    ) -> tuple[Use, ...]:
        """Put `keys` of `layer` into as many slots."""
        self._allocation.insert(layer, keys, weight)
        put = self.table.put
        return tuple([put(key, slot) for key, slot in zip(keys, slots, strict=True)])

    def state(self) -> CacheState:
        """Everything decisions depend on, between two tokens; counts are not part of it."""
        self._release()
        assert not self._keep, "a token is under way"
        return CacheState(
            tuple(self.table.key_in(slot) for slot in range(self.table.slots)),
            self._allocation.states(),
            tuple(self._useless),
            tuple(self._trust.mean),
            self.heat.states(),
        )

    def adopt(self, state: CacheState) -> None:
        """Go on from `state`, which this cache or one elsewhere came to."""
        self._keep.clear()
        self._in_use.clear()
        self._guesses.clear()
        self.table.adopt(state.keys)
        self._allocation.adopt(state.pools, self.table)
        self._useless = dict.fromkeys(state.useless)
        self._trust.mean = list(state.trust)
        self.heat.adopt(state.heat)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other."""
        self.table.check_integrity()
        order = list(self._allocation.keys())
        assert len(order) == len(self.table), "policy and table disagree"
        assert all(key in self.table for key in order), (
            "the policy orders a key that is not resident"
        )
        held = [sum(key[0] == layer for key in order) for layer in range(len(self.heat))]
        assert held == self._allocation.held, "resident keys of a layer are miscounted"
        guessed = {(at, expert) for at, guess in self._guesses.items() for expert in guess.experts}
        assert self._keep <= {*self._in_use, *guessed}, "a key stays for no reason"
        assert all(key in self.table for key in self._keep), "what is to stay is gone"
        assert all(key in self.table for key in self._useless), "what is useless is gone"
        for counts in self.statistics.layers:
            assert counts.hits + counts.misses == counts.requests


class _Guess:
    """What was guessed for a layer's next step."""

    __slots__ = ("absent", "experts", "loaded", "order")

    def __init__(self, experts: Sequence[int]) -> None:
        self.order = experts  # likeliest first
        self.experts = frozenset(experts)
        self.absent: frozenset[int] = frozenset()  # not resident when it was guessed
        self.loaded: frozenset[int] = frozenset()  # and then loaded

    def useless(self, layer: int, experts: Container[int]) -> dict[Key, None]:
        """The keys of `experts`, in the order of the guess."""
        return {(layer, expert): None for expert in self.order if expert in experts}
