"""LRU and LFU against lists that are sorted the slow way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.cache.policies import LFU, LRU, POLICIES
from offload.cache.policy import Key, Policy

keys = st.tuples(st.integers(0, 1), st.integers(0, 4))
steps = st.lists(st.tuples(st.sampled_from(("use", "use", "remove")), keys), max_size=60)


def apply(policy: Policy, resident: list[Key], step: str, key: Key) -> bool:
    """Do `step` as a cache would; False when it does not apply to `key`."""
    if step == "remove":
        if key not in resident:
            return False
        policy.remove(key)
    elif key in resident:
        policy.use([key])
    else:
        policy.insert([key])
    return True


def order(policy: Policy) -> list[Key]:
    """The resident keys as they would leave."""
    found: list[Key] = []
    while (victim := policy.first(found)) is not None:
        found.append(victim[1])
    return found


@settings(max_examples=100)
@given(steps=steps)
def test_lru_offers_the_longest_unused_key_first(steps: list[tuple[str, Key]]) -> None:
    policy = LRU()
    expected: list[Key] = []  # least recent first
    for step, key in steps:
        if apply(policy, expected, step, key):
            if key in expected:
                expected.remove(key)
            if step == "use":
                expected.append(key)
        assert order(policy) == expected


@settings(max_examples=100)
@given(steps=steps)
def test_lfu_offers_the_least_used_key_first_and_the_older_of_equals(
    steps: list[tuple[str, Key]],
) -> None:
    policy = LFU()
    resident: list[Key] = []  # longest resident first
    uses: dict[Key, int] = {}
    for step, key in steps:
        if not apply(policy, resident, step, key):
            continue
        if step == "remove":
            resident.remove(key)
        else:
            uses[key] = uses.get(key, 0) + 1
            if key not in resident:
                resident.append(key)
        expected = sorted(resident, key=lambda k: (uses[k], resident.index(k)))
        assert order(policy) == expected


def test_lfu_remembers_the_uses_of_keys_that_left() -> None:
    policy = LFU()
    for _ in range(3):
        policy.insert([(0, 0)])
        policy.remove((0, 0))
    policy.insert([(0, 1), (0, 0)])
    assert order(policy) == [(0, 1), (0, 0)]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_asking_for_victims_changes_nothing(name: str) -> None:
    policy = POLICIES[name]()
    policy.insert([(0, expert) for expert in (2, 0, 1, 3)])
    policy.use([(0, 0)])
    first = order(policy)
    assert sorted(policy.keys()) == sorted(first)
    assert order(policy) == first
    assert sorted(first) == [(0, expert) for expert in range(4)]
