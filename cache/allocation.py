"""Which layer gives a slot when another needs one.

Knows: how many keys each layer holds, and what the first victim of each is worth to the policy.
Does not know: slots; which order keys of one layer have (`cache.policy`).

Layers are used in turn. One list of all keys by last use (`Global`) therefore gives up, first of
all, what the deep layers are about to ask for. `Shared` asks how many steps *of its own layer* a
key was not used, and counts for how long its slot waits until that layer is asked again: a whole
token for the layer just served. `Quota` lets no layer have more than its share.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from math import inf
from operator import mul
from typing import Protocol, cast

from offload.cache.policy import Key, Policy, PoolState, PortablePolicy


class Allocation(Protocol):
    """Keeps the policy's pools and chooses victims from them."""

    pooled: bool  # a slot of any layer may be given to any other
    held: list[int]  # resident keys of each layer

    def use(self, layer: int, keys: Iterable[Key], weight: float) -> None:
        """A step of `layer` begins, which asks for the resident `keys`."""

    def insert(self, layer: int, keys: Sequence[Key], weight: float) -> None:
        """`keys` of `layer` became resident."""

    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""

    def clear(self) -> None:
        """Nothing is resident any more."""

    def changed(self, layer: int) -> None:
        """Other keys of `layer` must stay than before."""

    def room(self, layer: int) -> int:
        """How many more keys `layer` may hold while there are free slots."""

    def evict(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        """Remove at most `count` keys, none of `keep`, to make way for keys of `layer`."""

    def keys(self) -> Iterator[Key]:
        """Every resident key, for checks."""

    def states(self) -> tuple[PoolState, ...]:
        """Of every pool, where the policy is portable."""

    def adopt(self, states: Sequence[PoolState], resident: Container[Key]) -> None:
        """Go on from `states`; of their keys those in `resident` are."""


class _Pools:
    """What the allocations have in common: a pool for each layer, or one for all."""

    pooled = True

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        self.slots = slots
        self.held = [0] * layers
        self.pools = [policy() for _ in range(layers)]

    def use(self, layer: int, keys: Iterable[Key], weight: float) -> None:
        pool = self.pools[layer]
        pool.step()
        pool.use(keys, weight)
        self.changed(layer)

    def insert(self, layer: int, keys: Sequence[Key], weight: float) -> None:
        self.held[layer] += len(keys)
        self.pools[layer].insert(keys, weight)
        self.changed(layer)

    def remove(self, key: Key) -> None:
        layer = key[0]
        self.held[layer] -= 1
        self.pools[layer].remove(key)
        self.changed(layer)

    def clear(self) -> None:
        for pool in self.pools:
            pool.clear()
        self.held = [0] * len(self.held)

    def changed(self, layer: int) -> None:
        pass

    def room(self, layer: int) -> int:
        return self.slots

    def keys(self) -> Iterator[Key]:
        for pool in dict.fromkeys(self.pools):
            yield from pool.keys()

    def states(self) -> tuple[PoolState, ...]:
        return tuple(pool.state() for pool in self._portable())

    def adopt(self, states: Sequence[PoolState], resident: Container[Key]) -> None:
        self.clear()
        for pool, state in zip(self._portable(), states, strict=True):
            pool.adopt(state, resident)
            for key in pool.keys():  # noqa: SIM118  # a policy is no dict
                self.held[key[0]] += 1

    def _portable(self) -> list[PortablePolicy]:
        return [cast(PortablePolicy, pool) for pool in dict.fromkeys(self.pools)]

    def _evict_from(self, giver: int, count: int, keep: Container[Key]) -> list[Key]:
        found: list[Key] = []
        while len(found) < count and (victim := self.pools[giver].first(keep)) is not None:
            _, key = victim
            self.remove(key)
            found.append(key)
        return found


class Global(_Pools):
    """One pool. Simple, and for comparison: it starves deep layers."""

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(slots, layers, policy)
        self.pools = [self.pools[0]] * layers

    def use(self, layer: int, keys: Iterable[Key], weight: float) -> None:
        pool = self.pools[0]
        if layer == 0:  # once a token
            pool.step()
        pool.use(keys, weight)

    def evict(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        return self._evict_from(layer, count, keep)


class Quota(_Pools):
    """A fixed share of the slots for each layer. For comparison."""

    pooled = False

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(slots, layers, policy)
        shares = (slots // layers + (layer < slots % layers) for layer in range(layers))
        self.quotas = [max(1, share) for share in shares]
        self._too_few = slots < layers

    def room(self, layer: int) -> int:
        return max(0, self.quotas[layer] - self.held[layer])

    def evict(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        if self.held[layer] or not self._too_few:
            return self._evict_from(layer, count, keep)
        for _, giver in sorted((-held, giver) for giver, held in enumerate(self.held)):
            if found := self._evict_from(giver, 1, keep):
                return found
        return []


class Shared(_Pools):
    """One pool in which every layer's first victim is compared with every other's."""

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(slots, layers, policy)
        self._first: list[Key | None] = [None] * layers  # victim of each layer
        self._worth = [inf] * layers  # what it is worth
        self._changed = set(range(layers))
        self._paces = [
            [pace((giver - layer - 1) % layers + 1, layers) for giver in range(layers)]
            for layer in range(layers)
        ]

    def clear(self) -> None:
        super().clear()
        self._changed.update(range(len(self.held)))

    def changed(self, layer: int) -> None:
        self._changed.add(layer)

    def evict(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        for changed in self._changed:
            self._look(changed, keep)
        self._changed.clear()
        found: list[Key] = []
        paces = self._paces[layer]
        worth = list(map(mul, self._worth, paces))
        while (least := min(worth)) < inf:
            giver = worth.index(least)
            key = self._first[giver]
            assert key is not None, "worth something, but no key"
            self.held[giver] -= 1
            self.pools[giver].remove(key)
            found.append(key)
            if len(found) == count:
                self.changed(giver)
                break
            self._look(giver, keep)
            worth[giver] = self._worth[giver] * paces[giver]
        return found

    def _look(self, layer: int, keep: Container[Key]) -> None:
        """Find the first victim of `layer` and what it is worth."""
        victim = self.pools[layer].first(keep)
        self._worth[layer], self._first[layer] = victim or (inf, None)


def pace(ahead: int, layers: int) -> float:
    """What a chance is worth to a slot kept for a layer asked again `ahead` layers from now.

    The slot is tied up for that part of a token at least. That a token is added, for when the key
    is not asked for, is an estimate: 0.3 to 3 tokens hit within 0.2 points of it.
    """
    return 1.0 / (ahead / layers + 1.0)


ALLOCATIONS: dict[str, type[Shared] | type[Global] | type[Quota]] = {
    "shared": Shared,
    "global": Global,
    "quota": Quota,
}
