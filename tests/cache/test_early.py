"""What a prompt's next layer is begun to load before its router is asked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision, Use, Wave
from offload.cache.policies import LRU
from offload.cache.sharded import ShardedCache, card_and_row
from offload.cache.staging import Kept, Staging, absent, nearly_all, staging_of
from offload.cache.statistics import LayerCounts

SLOTS = 4


def test_seven_of_eight_chosen_make_the_next_layers_experts_sure() -> None:
    assert nearly_all(8, 8)
    assert nearly_all(7, 8)
    assert not nearly_all(6, 8)
    assert nearly_all(112, 128)
    assert not nearly_all(111, 128)
    assert not nearly_all(8, 128), "one token"


def test_what_has_no_slot_is_begun_the_hottest_first() -> None:
    cache = ExpertCache(2, 2, LRU)
    for experts in ((5, 3), (3,), (0, 1)):
        cache.decide(1, experts)
    assert absent(cache, 1, 6) == [3, 5, 2, 4]
    assert absent(cache, 0, 3) == [0, 1, 2]


def test_a_wrong_early_load_counts_as_a_load_and_a_right_one_once() -> None:
    counts = LayerCounts(misses=6, streamed=4, early_loads=3, early_loads_right=2)
    assert counts.loads == 7
    assert counts.early_loads_wrong == 1
    assert counts.loads_beside == 5


def test_what_came_early_is_computed_first_and_its_rows_are_filled_again() -> None:
    staging = Staging(SLOTS, 2)
    assert staging.early(1, [7, 8, 9], halves=1) == [Use(7, 4)]
    assert staging.early(1, [7, 8, 9]) == [Use(8, 5)]
    assert staging.early(1, [7, 8, 9]) == []
    decision = Decision(1, (Wave((Use(0, 0),), (Use(1, 1),)),), (7, 8, 9, 10))
    first, second, wave, third, fourth = staging.steps(decision)
    assert first == ((Use(1, 1),), (), (Use(7, 4),), (), True)
    assert second == ((Use(9, 4),), (), (Use(8, 5),), (), True)
    assert wave == ((Use(10, 5),), (Use(0, 0),), (Use(1, 1),), (), False)
    assert third == ((), (), (Use(9, 4),), (), True)
    assert fourth == ((), (), (Use(10, 5),), (), True)


def test_what_came_early_and_gets_a_slot_is_copied_on_from_its_row() -> None:
    staging = Staging(SLOTS, 2)
    staging.early(0, [7, 8])
    decision = Decision(0, (Wave((), (Use(7, 2), Use(1, 1))),), (8,))
    first, second, wave = staging.steps(decision)
    assert first.begin == (Use(1, 1),)
    assert first.loads == (Use(7, 4),)
    assert first.kept == (Kept(7, 4, 2),)
    assert (second.loads, second.kept) == ((Use(8, 5),), ())
    assert wave.loads == (Use(1, 1),), "not a second time"


def test_what_came_early_for_another_layer_or_is_not_asked_for_is_forgotten() -> None:
    for decision in (
        Decision(1, (), (7,)),
        Decision(0, (Wave((Use(3, 3),), ()),)),
        Decision(0, (), (9, 11)),
    ):
        staging = Staging(SLOTS, 2)
        staging.early(0, [7, 8])
        begun = [use.expert for step in staging.steps(decision) for use in step.begin]
        assert begun == list(decision.streamed)
        again = [
            use.expert for step in staging.steps(Decision(0, (), (7, 8))) for use in step.begin
        ]
        assert again == [7, 8]


def test_after_a_step_that_broke_off_nothing_is_in_the_rows() -> None:
    staging = Staging(SLOTS, 2)
    staging.early(1, [7])
    staging.start_over()
    (step,) = staging.steps(Decision(1, (), (7,)))
    assert [use.expert for use in step.begin] == [7]


def test_a_card_begins_early_in_rows_of_its_own() -> None:
    cache = ShardedCache([ExpertCache(3, 2, LRU), ExpertCache(5, 1, LRU)])
    staging = staging_of(cache, 2)[2]
    uses = staging.early(2, [1, 6])
    assert [card_and_row(use.slot, 2) for use in uses] == [(1, 5), (1, 6)]
    (first, second) = staging.steps(Decision(2, (), (1, 6)))
    assert first.begin == second.begin == ()


prompts = st.lists(
    st.tuples(
        st.integers(0, 2),  # layer
        st.lists(st.integers(0, 9), unique=True, min_size=1),
        st.integers(0, 3),  # admitted
        st.lists(st.integers(0, 9), unique=True),  # begun early for
        st.integers(0, 2),  # this layer
    ),
    min_size=2,
)


@given(rows=st.integers(2, 7), run=prompts)
def test_whatever_was_begun_early_each_expert_is_loaded_once_and_computed_from_its_own_bytes(
    rows: int, run: list[tuple[int, list[int], int, list[int], int]]
) -> None:
    cache, staging = ExpertCache(SLOTS, 3, LRU), Staging(SLOTS, rows)
    content: dict[int, tuple[int, int]] = {}  # slot or row -> what is, or will be, in it
    early: dict[int, set[int]] = {}
    for layer, experts, admit, guesses, later in run:
        decision = cache.decide(layer, experts, prompt=True, admit=admit)
        hits = {use.expert for wave in decision.waves for use in wave.hits}
        steps = staging.steps(decision)
        begun: list[int] = []
        computed: list[int] = []
        ahead: set[int] = set()
        for step in steps:
            assert step.hits or step.loads
            content |= {use.slot: (layer, use.expert) for use in step.begin}
            begun += [use.expert for use in step.begin]
            if step is steps[-1]:
                uses = staging.early(later, guesses, halves=1 if step.beside else 2)
                content |= {use.slot: (later, use.expert) for use in uses}
                ahead |= {use.expert for use in uses}
            for use in (*step.hits, *step.loads):
                assert content[use.slot] == (layer, use.expert)
                assert step.beside == (use.slot >= SLOTS)
                computed.append(use.expert)
            for kept in step.kept:
                assert content[kept.row] == (layer, kept.expert)
                content[kept.slot] = layer, kept.expert
        uses = staging.early(later, guesses)
        content |= {use.slot: (later, use.expert) for use in uses}
        assert sorted(computed) == sorted(experts)
        came = early.get(layer, set()) & (set(experts) - hits)
        assert sorted(begun) == sorted(set(experts) - hits - came)
        early = {later: ahead | {use.expert for use in uses}}
        for slot in range(SLOTS):
            assert cache.table.key_in(slot) in (None, content.get(slot))
