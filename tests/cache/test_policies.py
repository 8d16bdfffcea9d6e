"""Each policy alone, over integers: who is offered first, and equals in the order of slots."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.policies import LFRU, LRU, Key, Policy, to_26_bits
from offload.cache.trace.replay import LFU, REPLAYED

keys = st.tuples(st.integers(0, 1), st.integers(0, 4))
steps = st.lists(st.tuples(st.sampled_from(("use", "use", "remove", "step")), keys), max_size=60)


def slot_of(key: Key) -> int:
    """A slot of its own for each key, not in the order of the keys."""
    return (5 * key[0] + key[1]) * 7 % 10


def apply(policy: Policy, resident: set[Key], step: str, key: Key) -> bool:
    """Do `step` as a cache would; False if `key` was not used."""
    if step == "step":
        policy.step()
    elif step == "remove" and key in resident:
        policy.remove(key)
        resident.remove(key)
    elif step == "use" and key in resident:
        policy.use([key])
        return True
    elif step == "use":
        policy.insert([key], [slot_of(key)])
        resident.add(key)
        return True
    return False


def order(policy: Policy) -> list[Key]:
    """The resident keys in the order in which they would leave."""
    found: list[Key] = []
    while (victim := policy.first(found)) is not None:
        _, slot, key = victim
        assert slot == slot_of(key)
        found.append(key)
    return found


@settings(max_examples=100)
@given(steps=steps)
def test_lru_offers_the_longest_unused_key_first(steps: list[tuple[str, Key]]) -> None:
    policy, resident = LRU(), set[Key]()
    used: dict[Key, int] = {}
    now = 0
    for step, key in steps:
        now += step == "step"
        if apply(policy, resident, step, key):
            used[key] = now
        assert order(policy) == sorted(resident, key=lambda k: (used[k], slot_of(k)))


@settings(max_examples=100)
@given(steps=steps)
def test_lfu_offers_the_least_used_key_first(steps: list[tuple[str, Key]]) -> None:
    policy, resident = LFU(), set[Key]()
    uses: dict[Key, int] = {}
    for step, key in steps:
        if apply(policy, resident, step, key):
            uses[key] = uses.get(key, 0) + 1
        assert order(policy) == sorted(resident, key=lambda k: (uses[k], slot_of(k)))


@settings(max_examples=100)
@given(steps=steps)
def test_lfru_offers_the_key_of_the_least_decayed_uses_first(steps: list[tuple[str, Key]]) -> None:
    policy, resident = LFRU(half_life=1, repeats=0.5), set[Key]()
    uses: dict[Key, list[int]] = {}
    now = 0

    def worth(key: Key) -> float:
        score = sum(0.5 ** (now - at) for at in uses[key])  # exact
        return to_26_bits(score) + 2.0 * (uses[key][-1] == now)

    for step, key in steps:
        now += step == "step"
        if apply(policy, resident, step, key):
            uses.setdefault(key, []).append(now)
        assert order(policy) == sorted(resident, key=lambda k: (worth(k), slot_of(k)))


@pytest.mark.parametrize("first", [(0, 1), (0, 3)])
def test_lfru_takes_scores_for_equal_that_differ_by_rounding_only(first: Key) -> None:
    policy, second = LFRU(), (0, 4 - first[1])
    policy.insert([first], [slot_of(first)])
    for _ in range(32):  # two half-lives, after which a quarter counts what one use counted
        policy.step()
    policy.insert([second], [slot_of(second)], 0.25)
    policy.step()
    scores = [known.score for known in policy.state().keys.values()]
    assert 0 < abs(scores[0] - scores[1]) < 1e-12
    assert order(policy) == [(0, 3), (0, 1)], "the lower slot first"


def test_lfu_remembers_the_uses_of_keys_that_left() -> None:
    policy = LFU()
    for _ in range(3):
        policy.insert([(0, 0)], [slot_of((0, 0))])
        policy.remove((0, 0))
    policy.insert([(0, 1), (0, 0)], [slot_of((0, 1)), slot_of((0, 0))])
    assert order(policy) == [(0, 1), (0, 0)]


@pytest.mark.parametrize("name", sorted(REPLAYED))
def test_asking_for_victims_changes_nothing(name: str) -> None:
    policy = REPLAYED[name]()
    inserted = [(0, expert) for expert in (2, 0, 1, 3)]
    policy.insert(inserted, list(map(slot_of, inserted)))
    policy.use([(0, 0)])
    first = order(policy)
    assert sorted(policy.keys()) == sorted(first)
    assert order(policy) == first
    assert sorted(first) == [(0, expert) for expert in range(4)]
