"""Which key is in which slot, and which records lie in RAM if it cannot hold all of them."""

from collections.abc import Callable, Iterable, Sequence

from offload.cache.decision import Use
from offload.cache.policies import Key, Policy


class SlotTable:
    """Keys and the slots that hold them; a slot is an integer in `range(slots)`."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a cache needs at least one slot, not {slots}")
        self.slots = slots
        self._uses: dict[Key, Use] = {}  # an object is made at a load and handed out at every hit
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


class RecordPool:
    """Buffers, numbered from 0, of a tier that is asked for what the faster tier did not have.

    A record that is held is being read or copied, and is not evicted.
    """

    def __init__(self, buffers: int, policy: Callable[[], Policy]) -> None:
        self.table = SlotTable(buffers)
        self._policy = policy()
        self._holds: dict[Key, int] = {}
        self._layer = 0  # the layer that was asked last
        self.hits = self.misses = 0

    def find(self, key: Key, weight: float) -> int | None:
        """The buffer of `key`, which is held from now on; None if the key has to be placed."""
        if key[0] < self._layer:  # so a new token begins
            self._policy.step()
        self._layer = key[0]
        if key not in self.table:
            self.misses += 1
            return None
        self.hits += 1
        self._policy.use([key], weight)
        self.hold(key)
        return self.table.slot_of(key)

    def place(self, key: Key, weight: float) -> int | None:
        """A buffer for `key`, which is held from now on; None while every buffer is held."""
        buffer = self.table.take_free()
        if buffer is None:
            victim = self._policy.first(self._holds)
            if victim is None:
                return None
            _, buffer, evicted = victim
            self._policy.remove(evicted)
            self.table.remove(evicted)
        self.table.put(key, buffer)
        self._policy.insert([key], [buffer], weight)
        self.hold(key)
        return buffer

    def hold(self, key: Key) -> None:
        """Keep `key` until it is released as often as it was held."""
        self._holds[key] = self._holds.get(key, 0) + 1

    def release(self, key: Key) -> None:
        """One holder of `key` is done with it."""
        if self._holds[key] == 1:
            del self._holds[key]
        else:
            self._holds[key] -= 1

    def forget(self, key: Key) -> None:
        """Take `key` out again: it was placed, but its bytes never came."""
        self._holds.pop(key, None)
        self._policy.remove(key)
        self.table.give_back(self.table.remove(key))

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other."""
        self.table.check_integrity()
        assert sorted(self._policy.keys()) == sorted(self.table.keys()), "policy and table disagree"
        assert all(key in self.table for key in self._holds), "a held key is gone"
        assert all(count > 0 for count in self._holds.values()), "held by nobody"
