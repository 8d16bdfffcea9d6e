"""What every eviction policy offers.

Knows: keys, the protocol. Does not know: slots, nor which keys must stay (the caller says); the
policies themselves are in `cache.policies`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple, Protocol

Key = tuple[int, int]  # (MoE layer, expert)
# What keeping a key is worth, and the key: how likely its layer's next step asks for it, in a unit
# that all pools of one policy share.
Victim = tuple[float, Key]


class Policy(Protocol):
    """Orders the resident keys of one pool (a layer's, or all) from first to leave to last.

    `weight` says how much a use counts: 1 for a generated token, less for a prompt, 0 for what
    came without being asked for.
    """

    def step(self) -> None:
        """The pool's clock goes on: each of its layers is about to be asked once more."""

    def insert(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        """`keys` became resident."""

    def use(self, keys: Iterable[Key], weight: float = 1.0) -> None:
        """The resident `keys` were asked for."""

    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""

    def clear(self) -> None:
        """Nothing is resident any more."""

    def first(self, keep: Container[Key]) -> Victim | None:
        """The key to evict first of those that are not in `keep`. It stays in the pool."""

    def keys(self) -> Iterable[Key]:
        """The resident keys, for checks."""


class KeyState(NamedTuple):
    """What a policy knows of a key. `score`: uses that it counts; `number`: of its place among
    equals; `used`: the pool's step when it was used last, or anything else if not lately."""

    score: float
    number: int
    used: int


class PoolState(NamedTuple):
    """What a policy knows, as values that another one of its kind can go on from."""

    now: int  # steps
    unit: float  # what a use counts
    inserted: int  # the highest number given
    keys: dict[Key, KeyState]  # every key it knows, resident or not


class PortablePolicy(Policy, Protocol):
    """A policy whose state can be taken elsewhere: a GPU, and back."""

    def state(self) -> PoolState:
        """Everything it knows."""

    def adopt(self, state: PoolState, resident: Container[Key]) -> None:
        """Go on from `state`; of its keys those in `resident` are."""
