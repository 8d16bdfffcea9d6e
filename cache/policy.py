"""What every eviction policy offers.

Knows: keys, the protocol. Does not know: slots, nor which keys must stay (the caller takes victims
in order and skips those); the policies themselves are in `cache.policies`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

Key = tuple[int, int]  # (MoE layer, expert)


class Policy(Protocol):
    """Orders the resident keys of one pool (a layer's, or all) from first to leave to last.

    `weight` says how much a use counts: 1 for a generated token, less for a prompt, 0 for what
    came without being asked for.
    """

    def step(self) -> None:
        """The pool's clock goes on: each of its layers is about to be asked once more."""

    def insert(self, key: Key, weight: float = 1.0) -> None:
        """`key` became resident."""

    def use(self, key: Key, weight: float = 1.0) -> None:
        """The resident `key` was asked for."""

    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""

    def clear(self) -> None:
        """Nothing is resident any more."""

    def victims(self) -> Iterator[Key]:
        """Resident keys, the one to evict first first. Not to be changed while iterating."""

    def value(self, key: Key) -> float:
        """What keeping the resident `key` is worth, comparable among pools of one policy."""
