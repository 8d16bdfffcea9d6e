"""Which records lie in which of a tier's buffers.

Knows: keys, buffers as integers, who is held, a policy over the rest. Does not know: bytes, disks,
threads (`offload.disk_tier`).
"""

from __future__ import annotations

from collections.abc import Callable

from offload.cache.policy import Key, Policy
from offload.cache.slots import SlotTable


class RecordPool:
    """Buffers of a tier that only sees what the faster tier before it did not have.

    A held record is being read, or copied from: it stays.
    """

    def __init__(self, buffers: int, policy: Callable[[], Policy]) -> None:
        self.table = SlotTable(buffers)
        self._policy = policy()
        self._holds: dict[Key, int] = {}
        self._layer = 0  # asked last
        self.hits = self.misses = 0

    def find(self, key: Key, weight: float) -> int | None:
        """The buffer of `key`, which is asked for and held; None: it has to be placed."""
        if key[0] < self._layer:  # the next token
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
        """A buffer for `key`, which is held; None while every one is held."""
        buffer = self.table.take_free()
        if buffer is None:
            victim = self._policy.first(self._holds)
            if victim is None:
                return None
            self._policy.remove(victim[1])
            buffer = self.table.remove(victim[1])
        self.table.put(key, buffer)
        self._policy.insert([key], weight)
        self.hold(key)
        return buffer

    def hold(self, key: Key) -> None:
        self._holds[key] = self._holds.get(key, 0) + 1

    def release(self, key: Key) -> None:
        """One use of `key` is over."""
        if self._holds[key] == 1:
            del self._holds[key]
        else:
            self._holds[key] -= 1

    def forget(self, key: Key) -> None:
        """`key` was placed, but its bytes never came."""
        self._holds.pop(key, None)
        self._policy.remove(key)
        self.table.give_back(self.table.remove(key))

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other."""
        self.table.check_integrity()
        assert sorted(self._policy.keys()) == sorted(self.table.keys()), "policy and table disagree"
        assert all(key in self.table for key in self._holds), "what is held is gone"
        assert all(count > 0 for count in self._holds.values()), "held by nobody"
