"""The slot table against a plain dictionary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.policies import Key
from offload.cache.slots import SlotTable

keys = st.tuples(st.integers(0, 2), st.integers(0, 4))
steps = st.lists(st.tuples(st.sampled_from(("put", "replace")), keys), max_size=60)


@settings(max_examples=100)
@given(slots=st.integers(1, 6), steps=steps)
def test_behaves_like_a_dictionary_of_keys_and_slots(
    slots: int, steps: list[tuple[str, Key]]
) -> None:
    table = SlotTable(slots)
    model: dict[Key, int] = {}
    for step, key in steps:
        if step == "put" and key not in model:
            slot = table.take_free()
            assert (slot is None) == (len(model) == slots)
            if slot is not None:
                assert slot in set(range(slots)) - set(model.values())
                table.put(key, slot)
                model[key] = slot
        elif step == "replace" and model and key not in model:
            slot = table.remove(first := next(iter(model)))
            assert slot == model.pop(first)
            table.put(key, slot)
            model[key] = slot
        table.check_integrity()
        assert len(table) == len(model)
        assert all(known in table and table.slot_of(known) == model[known] for known in model)
        assert (key in table) == (key in model)
        held = {slot: known for known, slot in model.items()}
        assert [table.key_in(slot) for slot in range(slots)] == [
            held.get(slot) for slot in range(slots)
        ]


@pytest.mark.parametrize("slots", [0, -1])
def test_refuses_to_be_built_without_a_slot(slots: int) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        SlotTable(slots)


def test_unknown_key_has_no_slot() -> None:
    table = SlotTable(2)
    assert (0, 1) not in table
    with pytest.raises(KeyError):
        table.slot_of((0, 1))
    with pytest.raises(KeyError):
        table.remove((0, 1))


def test_slot_that_is_taken_but_not_put_is_reported_as_lost() -> None:
    table = SlotTable(2)
    table.take_free()
    with pytest.raises(AssertionError, match="lost"):
        table.check_integrity()


def test_occupied_slot_and_resident_key_are_not_put_again() -> None:
    table = SlotTable(2)
    table.put((0, 0), 0)
    with pytest.raises(AssertionError):
        table.put((0, 1), 0)
    with pytest.raises(AssertionError):
        table.put((0, 0), 1)
