"""Which records lie in which buffers of the tier before the disk."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload.cache.cache import ExpertCache
from offload.cache.policies import LFRU, LRU, Key
from offload.cache.slots import RecordPool
from offload.cache.trace.synthetic import Routing, Shape, synthesize

BUFFERS = 3


def asked(pool: RecordPool, key: Key) -> int:
    """The buffer of `key`, brought there if need be, and let go again."""
    buffer = pool.find(key, 1.0)
    if buffer is None:
        buffer = pool.place(key, 1.0)
    assert buffer is not None
    pool.release(key)
    return buffer


def test_what_was_asked_for_least_recently_makes_way() -> None:
    pool = RecordPool(2, LRU)
    first, second = asked(pool, (0, 0)), asked(pool, (1, 0))
    assert asked(pool, (0, 0)) == first
    assert asked(pool, (2, 0)) == second
    assert asked(pool, (0, 0)) == first
    assert (pool.hits, pool.misses) == (2, 3)


@pytest.mark.parametrize("experts", [8, 128])
@pytest.mark.parametrize(("slots", "held"), [(0.34, 0.4), (0.34, 0.61), (0.5, 0.5)])
def test_behind_slots_it_holds_of_what_is_loaded_as_much_as_of_all(
    experts: int, slots: float, held: float
) -> None:
    """`offload plan` relies on this: experts that have a slot too take up their part of RAM."""
    shape = Shape("x", 8, experts, 2 if experts == 8 else 8, 1, 0, 4.5)
    every = shape.layers * experts
    cache = ExpertCache(round(every * slots), shape.layers, LFRU)
    pool = RecordPool(round(every * held), LFRU)
    for at, event in enumerate(synthesize(shape, Routing(), 160).events):
        if at == 80 * shape.layers:
            pool.hits = pool.misses = 0
        for wave in cache.decide(event.layer, event.distinct()).waves:
            for use in wave.loads:
                asked(pool, (event.layer, use.expert))
    from_disk = pool.misses / (pool.hits + pool.misses)
    assert from_disk == pytest.approx(1 - held, abs=0.13)


def test_what_is_asked_for_often_outlives_what_came_once() -> None:
    pool = RecordPool(2, LFRU)
    for _ in range(5):
        asked(pool, (0, 0))
        asked(pool, (1, 7))
    asked(pool, (0, 1))  # in the place of one of the two
    for expert in (2, 3, 4):
        asked(pool, (1, expert))  # in the place of what came once
    assert ((0, 0) in pool.table) or ((1, 7) in pool.table)


def test_what_is_held_stays_and_a_release_makes_room() -> None:
    pool = RecordPool(2, LRU)
    for expert in (0, 1):
        assert pool.find((0, expert), 1.0) is None
        assert pool.place((0, expert), 1.0) is not None
    assert pool.place((0, 2), 1.0) is None
    pool.hold((0, 0))
    pool.release((0, 0))
    assert pool.place((0, 2), 1.0) is None
    pool.release((0, 0))
    assert pool.place((0, 2), 1.0) is not None
    assert (0, 0) not in pool.table


def test_what_never_came_leaves_its_buffer_free() -> None:
    pool = RecordPool(1, LRU)
    assert pool.place((0, 0), 1.0) == 0
    pool.forget((0, 0))
    assert pool.place((0, 1), 1.0) == 0
    pool.check_integrity()


class Machine(RuleBasedStateMachine):
    """Held records stay where they are; no buffer has two."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = RecordPool(BUFFERS, LFRU)
        self.held: list[tuple[Key, int]] = []

    @rule(layer=st.integers(0, 3), expert=st.integers(0, 3), weight=st.sampled_from([0.0, 1.0]))
    def ask(self, layer: int, expert: int, weight: float) -> None:
        key = (layer, expert)
        buffer = self.pool.find(key, weight)
        if buffer is None:
            buffer = self.pool.place(key, weight)
        if buffer is None:
            assert len({key for key, _ in self.held}) == BUFFERS
        else:
            self.held.append((key, buffer))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        key, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(key)

    @invariant()
    def holds(self) -> None:
        self.pool.check_integrity()
        for key, buffer in self.held:
            assert self.pool.table.slot_of(key) == buffer


TestAnyOrder = Machine.TestCase
