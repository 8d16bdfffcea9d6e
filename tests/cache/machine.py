"""A machine that carries out what the cache decides, over slots that hold only names.

As an engine does, the machine starts the loads of a wave, computes and goes on to the next wave. It
asserts that each computed expert is in its slot and checks the cache's promises after every step.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision, Use
from offload.cache.policies import Key
from offload.cache.staging import Staging
from offload.cache.trace.replay import REPLAYED


@dataclass(frozen=True)
class Size:
    slots: int
    layers: int
    experts: int
    policy: str = "lru"
    staging: int = 2


@dataclass(frozen=True)
class DecideStep:
    layer: int
    experts: tuple[int, ...]
    fails_after: int | None = None  # uses, when the step is to fail
    prompt: bool = False
    admit: int | None = None


@dataclass(frozen=True)
class LookAhead:
    layer: int
    experts: tuple[int, ...]
    most: int


@dataclass(frozen=True)
class Warm:
    layer: int
    expert: int


@dataclass(frozen=True)
class StartOver:
    """What an engine does after a step that broke off."""


Step = DecideStep | LookAhead | Warm | StartOver


def sizes(most_slots: int = 8) -> st.SearchStrategy[Size]:
    return st.builds(
        Size,
        slots=st.integers(1, most_slots),
        layers=st.integers(1, 3),
        experts=st.integers(1, 6),
        policy=st.sampled_from(sorted(REPLAYED)),
        staging=st.integers(2, 5),
    )


def steps_of(size: Size, *, breaks: bool = True) -> st.SearchStrategy[list[Step]]:
    layer = st.integers(0, size.layers - 1)
    experts = st.lists(st.integers(0, size.experts - 1), unique=True).map(tuple)
    admit = st.none() | st.integers(0, 3)
    decided = st.builds(DecideStep, layer, experts, prompt=st.booleans(), admit=admit)
    guesses = st.builds(LookAhead, layer, experts, st.integers(0, size.experts))
    kinds: list[st.SearchStrategy[Step]] = [decided, decided, guesses]
    warm = st.builds(Warm, layer, st.integers(0, size.experts - 1))
    kinds.append(warm)
    if breaks:
        failing = st.builds(DecideStep, layer, experts, st.integers(0, 4), admit=admit)
        kinds += [failing, st.builds(StartOver)]
    return st.lists(st.one_of(kinds), min_size=8, max_size=25)


def runs(*, breaks: bool = True) -> st.SearchStrategy[tuple[Size, list[Step]]]:
    return sizes().flatmap(lambda n: st.tuples(st.just(n), steps_of(n, breaks=breaks)))


class Machine:
    """One cache and the slots it decides over."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.cache = ExpertCache(size.slots, size.layers, REPLAYED[size.policy])
        self.staging = Staging(size.slots, size.staging)
        self.content: dict[int, Key] = {}  # what was last loaded into a slot or a staging row
        self.guessed: dict[int, set[Key]] = {}  # layer -> loads nobody asked for yet
        self.in_use: dict[Key, int] = {}  # of the latest decision, what is resident after it
        self.decisions: list[Decision | tuple[Use, ...]] = []
        self.loaded: list[Key] = []
        self.hits = self.misses = self.evictions = self.streamed = 0
        self.lookahead_loads = self.warm_loads = 0

    def do(self, step: Step) -> None:
        before = self.resident()
        loads = len(self.loaded) - self.streamed
        match step:
            case DecideStep(layer, experts, None, prompt, admit):
                self.decide(layer, experts, prompt, admit)
            case DecideStep(layer, experts, int(uses), prompt, admit):
                self.failing_step(layer, experts, uses, prompt, admit)
            case LookAhead(layer, experts, most):
                self.look_ahead(layer, experts, most)
            case Warm(layer, expert):
                self.warm(layer, expert)
            case StartOver():
                self.start_over()
        self.check(before, len(self.loaded) - self.streamed - loads, step)

    def resident(self) -> dict[Key, int]:
        table = self.cache.table
        keys = [table.key_in(slot) for slot in range(table.slots)]
        return {key: slot for slot, key in enumerate(keys) if key is not None}

    def decide(
        self,
        layer: int,
        experts: tuple[int, ...],
        prompt: bool = False,
        admit: int | None = None,
    ) -> Decision:
        decision = self._decide(layer, experts, prompt, admit)
        for step in self.staging.steps(decision):
            for use in step.begin:
                self._load((layer, use.expert), use.slot)
            for use in (*step.hits, *step.loads):
                self._compute(layer, use)
        resident = self.resident()
        self.in_use = {(layer, e): resident[layer, e] for e in experts if (layer, e) in resident}
        return decision

    def failing_step(
        self, layer: int, experts: tuple[int, ...], uses: int, prompt: bool, admit: int | None
    ) -> None:
        """A step that fails at its use number `uses`, and what an engine does then."""
        decision = self._decide(layer, experts, prompt, admit)
        for step in self.staging.steps(decision):
            for use in step.begin:
                self._load((layer, use.expert), use.slot)
            for use in (*step.hits, *step.loads):
                if uses == 0:
                    return self.start_over()
                self._compute(layer, use)
                uses -= 1
        self.start_over()

    def look_ahead(self, layer: int, experts: tuple[int, ...], most: int) -> tuple[Use, ...]:
        loads = self.cache.look_ahead(layer, experts, most)
        self.decisions.append(loads)
        assert len(loads) <= most
        assert len({use.slot for use in loads}) == len(loads)
        for use in loads:
            assert use.expert in experts
            self._load((layer, use.expert), use.slot)
        self.guessed[layer] = self.guessed.get(layer, set()) & {(layer, e) for e in experts}
        self.guessed[layer] |= {(layer, use.expert) for use in loads}
        self.lookahead_loads += len(loads)
        resident = self.resident()
        assert self.in_use.items() <= resident.items(), "look-ahead evicted what is in use"
        kept = {key for keys in self.guessed.values() for key in keys}
        assert len(kept) < self.size.slots, "no slot is left to decide with"
        return loads

    def warm(self, layer: int, expert: int) -> None:
        before = self.resident()
        use = self.cache.warm(layer, expert)
        if use is not None:
            assert use.slot not in before.values(), "a warm start evicted"
            self._load((layer, expert), use.slot)
            self.warm_loads += 1

    def start_over(self) -> None:
        self.cache.forget()
        self.guessed.clear()
        self.in_use = {}
        assert not self.resident()

    def _decide(
        self, layer: int, experts: tuple[int, ...], prompt: bool, admit: int | None
    ) -> Decision:
        before = self.resident()
        known = {expert for expert in experts if (layer, expert) in before}
        decision = self.cache.decide(layer, experts, prompt=prompt, admit=admit)
        self.guessed.pop(layer, None)
        self.decisions.append(decision)
        assert decision.layer == layer
        uses = [use for wave in decision.waves for use in (*wave.hits, *wave.loads)]
        served = [*(use.expert for use in uses), *decision.streamed]
        assert sorted(served) == sorted(experts), "each expert exactly once"
        self._check_streamed(decision, admit)
        hits = [use for wave in decision.waves for use in wave.hits]
        assert {use.expert for use in hits} == known, "hits are what was resident"
        assert all(before[layer, use.expert] == use.slot for use in hits)
        assert not any(wave.hits for wave in decision.waves[1:]), "residents come first"
        for wave in decision.waves:
            slots = [use.slot for use in (*wave.hits, *wave.loads)]
            assert slots, "an empty wave"
            assert len(set(slots)) == len(slots), "two experts of a wave in one slot"
            assert set(slots) <= set(range(self.size.slots))
        for earlier, later in zip(decision.waves, decision.waves[1:], strict=False):
            over = {use.slot for use in (*earlier.hits, *earlier.loads)}
            assert {use.slot for use in later.loads} <= over, "a wave takes over the one before"
        if decision.waves:
            last = decision.waves[-1]
            after = self.resident()
            assert all(after[layer, use.expert] == use.slot for use in (*last.hits, *last.loads))
        self.hits += len(hits)
        self.misses += len(served) - len(hits)
        self.streamed += len(decision.streamed)
        return decision

    def _check_streamed(self, decision: Decision, admit: int | None) -> None:
        """What is streamed gets no slot, and spares the waves."""
        resident = self.resident()
        assert not decision.streamed or admit is not None, "streamed though all may evict"
        assert not any((decision.layer, expert) in resident for expert in decision.streamed)
        assert admit is None or len(decision.waves) <= 1, "waves though there is staging"

    def _load(self, key: Key, slot: int) -> None:
        self.content[slot] = key
        self.loaded.append(key)

    def _compute(self, layer: int, use: Use) -> None:
        assert self.content[use.slot] == (layer, use.expert), "computed from another expert's bytes"

    def check(self, before: dict[Key, int], loads: int, step: Step) -> None:
        """What holds after every step."""
        self.cache.check_integrity()
        resident = self.resident()
        for key, slot in resident.items():
            assert self.content[slot] == key, f"the table promises {key}, which was never loaded"
        for keys in self.guessed.values():
            assert keys <= resident.keys(), "a guess left before it was asked for"
        total = self.cache.statistics.total()
        assert (total.hits, total.misses) == (self.hits, self.misses)
        assert total.hits + total.misses == total.requests
        assert total.lookahead_loads == self.lookahead_loads
        assert total.warm_loads == self.warm_loads
        assert total.streamed == self.streamed
        assert total.loads == total.misses + total.lookahead_loads + total.warm_loads
        assert total.lookahead_loads_right <= min(total.lookahead_loads, total.lookahead_right)
        whole = not isinstance(step, StartOver) and getattr(step, "fails_after", None) is None
        if whole:
            self.evictions += len(before) + loads - len(resident)
            assert total.evictions == self.evictions
        self.evictions = total.evictions
