"""Which key is in which slot, and which slots are free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from offload.cache.decision import Use
from offload.cache.policies import Key


class SlotTable:
    """Keys and the slots that hold them; a slot is an integer in `range(slots)`."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a cache needs at least one slot, not {slots}")
        self.slots = slots
        self._uses: dict[Key, Use] = {}  # made at a load, handed out at every hit
        self._key_in: list[Key | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))

    def __contains__(self, key: object) -> bool:
        return key in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    def uses_of(self, keys: Iterable[Key]) -> list[Use | None]:
        """The expert and the slot of each key, or None for a key without a slot."""
        get = self._uses.get
        return [get(key) for key in keys]

    def slot_of(self, key: Key) -> int:
        return self._uses[key].slot

    def key_in(self, slot: int) -> Key | None:
        return self._key_in[slot]

    def take_free(self) -> int | None:
        """Take a free slot, the lowest at first; None when all are taken."""
        return self._free.pop() if self._free else None

    def adopt(self, keys: Sequence[Key | None]) -> None:
        """Hold exactly `keys`, which has the key of each slot, or None."""
        self._key_in = list(keys)
        self._uses = {key: Use(key[1], slot) for slot, key in enumerate(keys) if key is not None}
        self._free = [slot for slot in reversed(range(self.slots)) if keys[slot] is None]

    def has_free(self) -> bool:
        return bool(self._free)

    def put(self, key: Key, slot: int) -> Use:
        """Place `key` in `slot`, which `take_free` or `remove` returned."""
        assert self._key_in[slot] is None, f"slot {slot} is taken"
        assert key not in self._uses, f"{key} has a slot"
        self._key_in[slot] = key
        use = self._uses[key] = Use(key[1], slot)
        return use

    def remove(self, key: Key) -> int:
        """Take `key` out and return its slot, which does not become free."""
        slot = self._uses.pop(key).slot
        self._key_in[slot] = None
        return slot

    def give_back(self, slot: int) -> None:
        """Make a slot free again that `take_free` or `remove` returned."""
        self._free.append(slot)

    def keys(self) -> Iterable[Key]:
        """The resident keys."""
        return self._uses.keys()

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the table contradicts itself."""
        assert len(self._uses) + len(self._free) == self.slots, "a slot is lost"
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        for key, (expert, slot) in self._uses.items():
            assert self._key_in[slot] == key, f"slot {slot} does not hold {key}"
            assert key[1] == expert, f"{key} is handed out as {expert}"
        for slot in self._free:
            assert self._key_in[slot] is None, f"free slot {slot} holds a key"
