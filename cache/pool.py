"""Which records lie in which buffers of the RAM tier that stands before the disk."""

from __future__ import annotations

from collections.abc import Callable

from offload.cache.policies import Key, Policy
from offload.cache.slots import SlotTable


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
        if key[0] < self._layer:  # a new token begins
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
