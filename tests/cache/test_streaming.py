"""What a prompt streams past the slots, and in which order it is loaded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.cache.cache import ExpertCache
from offload.cache.decision import Decision, Use, Wave
from offload.cache.policies import LRU, POLICIES
from offload.cache.staging import Staging
from offload.cache.trace.replay import Setup, admitted, replay
from offload.cache.trace.trace import Event, Trace, TraceHeader


def resident(cache: ExpertCache, layer: int = 0) -> list[int]:
    return [expert for expert in range(20) if cache.is_resident(layer, expert)]


def test_a_prompt_evicts_only_for_what_its_last_token_chose() -> None:
    cache = ExpertCache(4, 1, LRU)
    cache.decide(0, (0, 1, 2, 3))
    decision = cache.decide(0, (9, 3, 8, 7, 6), prompt=True, admit=2)
    (wave,) = decision.waves
    assert [use.expert for use in wave.hits] == [3]
    assert [use.expert for use in wave.loads] == [7, 6]
    assert decision.streamed == (9, 8)
    assert resident(cache) == [2, 3, 6, 7]
    counts = cache.statistics.total()
    assert (counts.requests, counts.hits, counts.misses) == (9, 1, 8)
    assert (counts.streamed, counts.loads, counts.evictions) == (2, 8, 2)
    cache.check_integrity()


def test_a_prompt_fills_free_slots_with_what_it_asked_for_last() -> None:
    cache = ExpertCache(4, 1, LRU)
    decision = cache.decide(0, (0, 1, 2, 3, 4, 5), prompt=True, admit=1)
    assert decision.streamed == (0, 1)
    assert resident(cache) == [2, 3, 4, 5]
    assert cache.statistics.total().evictions == 0


def test_what_is_in_use_is_not_evicted_for_a_prompt() -> None:
    cache = ExpertCache(2, 1, LRU)
    cache.decide(0, (0, 1))
    decision = cache.decide(0, (5, 0, 6, 1, 7), prompt=True, admit=3)
    assert decision.streamed == (5, 6, 7)
    assert resident(cache) == [0, 1]


def test_where_look_ahead_holds_every_slot_but_one_a_prompt_is_streamed_whole() -> None:
    cache = ExpertCache(1, 2, LRU)
    cache.decide(0, (0,))
    decision = cache.decide(1, (3, 4), prompt=True, admit=0)
    assert decision == Decision(1, (), (3, 4))
    assert resident(cache) == [0]


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    before=st.lists(st.integers(0, 11), unique=True, min_size=1, max_size=6),
    prompt=st.lists(st.integers(0, 11), unique=True),
    admit=st.integers(0, 12),
)
def test_a_prompt_never_evicts_more_than_it_admits(
    policy: str, before: list[int], prompt: list[int], admit: int
) -> None:
    cache = ExpertCache(6, 1, POLICIES[policy])
    cache.decide(0, before)
    cache.decide(0, prompt, prompt=True, admit=admit)
    assert len(set(before) - set(resident(cache))) <= admit
    cache.check_integrity()


def decisions() -> st.SearchStrategy[Decision]:
    """Of a prompt over 4 slots, or of a step in waves."""
    streamed = st.lists(st.integers(10, 40), unique=True).map(tuple)
    uses = (Use(0, 0), Use(1, 1)), (Use(2, 2), Use(3, 3))
    whole = st.sampled_from([(), (Wave(*uses),), (Wave(uses[0], ()),), (Wave((), uses[1]),)])
    waves = (Wave(*uses), Wave((), (Use(4, 0),)), Wave((), (Use(5, 0), Use(6, 1))))
    return st.just(Decision(0, waves)) | st.builds(Decision, st.just(0), whole, streamed)


@given(rows=st.integers(2, 9), run=st.lists(decisions()))
def test_each_load_is_begun_once_before_its_use_and_overwrites_nothing_needed(
    rows: int, run: list[Decision]
) -> None:
    staging = Staging(4, rows)
    for decision in run:
        steps = staging.steps(decision)
        begun = [use for step in steps for use in step.begin]
        uses = [use for step in steps for use in (*step.hits, *step.loads)]
        assert begun == [use for step in steps for use in step.loads]
        hits = [use.expert for wave in decision.waves for use in wave.hits]
        loads = [use.expert for wave in decision.waves for use in wave.loads]
        assert sorted(use.expert for use in uses) == sorted([*hits, *loads, *decision.streamed])
        content: dict[int, int] = {use.slot: use.expert for w in decision.waves for use in w.hits}
        for number, step in enumerate(steps):
            content.update({use.slot: use.expert for use in step.begin})
            assert all(content[use.slot] == use.expert for use in (*step.hits, *step.loads))
            assert all(4 <= use.slot < 4 + rows for use in step.loads if use.expert >= 10)
            if decision.streamed and number + 1 < len(steps):
                following = steps[number + 1].loads
                assert all(content[use.slot] == use.expert for use in following), "begun late"


def test_small_records_are_streamed_several_at_once() -> None:
    staging = Staging(10, 4)
    first, second, third = staging.steps(Decision(0, (), tuple(range(5))))
    assert first.begin == (Use(0, 10), Use(1, 11), Use(2, 12), Use(3, 13))
    assert first.loads == (Use(0, 10), Use(1, 11))
    assert second.begin == third.loads == (Use(4, 10),)
    assert staging.steps(Decision(0, (), (7,)))[0].loads == (Use(7, 12),), "the other half's turn"


@pytest.mark.parametrize("rows", [-2, 1])
def test_one_row_is_no_staging(rows: int) -> None:
    with pytest.raises(ValueError, match="two rows or more"):
        Staging(4, rows)


def test_replays_stream_prompts_unless_everything_fits() -> None:
    header = TraceHeader("made up", (6, 6), 2, (10, 10))
    prompt = tuple((expert, (expert + 1) % 6) for expert in range(6))
    events = [Event(layer, True, prompt) for layer in range(2)]
    assert admitted(events[0], Setup(4, "lru"), header) == 2
    assert admitted(events[0], Setup(12, "lru"), header) is None
    assert admitted(events[0], Setup(4, "belady"), header) is None
    assert admitted(events[0]._replace(prompt=False), Setup(4, "lru"), header) is None
    outcome = replay(Trace(header, events), Setup(4, "lru"))
    assert outcome.counts.streamed == 6
    assert outcome.bytes_loaded == 12 * 10
