"""Which key is in which slot.

Knows: the one-to-one table of resident keys and slots, and the free slots. Does not know: why a key
is there (`cache.policy`) nor what it weighs.
"""

from __future__ import annotations

from cache.policy import Key


class SlotTable:
    """Keys and the slots that hold them; a slot is an integer in `range(slots)`."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a cache needs at least one slot, not {slots}")
        self.slots = slots
        self._slot_of: dict[Key, int] = {}
        self._key_in: list[Key | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def slot_of(self, key: Key) -> int:
        return self._slot_of[key]

    def key_in(self, slot: int) -> Key | None:
        return self._key_in[slot]

    def take_free(self) -> int | None:
        """Remove and return a free slot, or None when all are taken."""
        return self._free.pop() if self._free else None

    def has_free(self) -> bool:
        return bool(self._free)

    def put(self, key: Key, slot: int) -> None:
        """Place `key` in `slot`, which `take_free` or `remove` returned."""
        assert self._key_in[slot] is None, f"slot {slot} is taken"
        assert key not in self._slot_of, f"{key} has a slot"
        self._slot_of[key] = slot
        self._key_in[slot] = key

    def remove(self, key: Key) -> int:
        """Take `key` out and return its slot, which is not put among the free ones."""
        slot = self._slot_of.pop(key)
        self._key_in[slot] = None
        return slot

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the table contradicts itself."""
        assert len(self._slot_of) + len(self._free) == self.slots, "a slot is lost"
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        for key, slot in self._slot_of.items():
            assert self._key_in[slot] == key, f"slot {slot} does not hold {key}"
        for slot in self._free:
            assert self._key_in[slot] is None, f"free slot {slot} holds a key"
