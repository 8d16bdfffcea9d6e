"""Which layer gives a slot when another needs one.

Knows: how many keys each layer holds, and what the first victim of each is worth to the policy.
Does not know: slots; which order keys of one layer have (`cache.policy`).

Layers are used in turn. One list of all keys by last use (`Global`) therefore gives up, first of
all, what the deep layers are about to ask for. `Shared` asks how many steps *of its own layer* a
key was not used, and among equals takes it from the layer that is asked again last: the one just
served. `Quota` lets no layer have more than its share.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from itertools import islice
from math import inf
from typing import Protocol

from cache.policy import Key, Policy


class Allocation(Protocol):
    """Keeps the policy's pools and chooses victims from them."""

    pooled: bool  # a slot of any layer may be given to any other
    held: list[int]  # resident keys of each layer

    def step(self, layer: int) -> None:
        """A step of `layer` begins; its uses follow."""

    def insert(self, key: Key, weight: float) -> None: ...
    def use(self, key: Key, weight: float) -> None: ...
    def remove(self, key: Key) -> None: ...
    def clear(self) -> None: ...

    def changed(self, layer: int) -> None:
        """Keys of `layer` left that were no victims, or other ones must stay than before."""

    def room(self, layer: int) -> int:
        """How many more keys `layer` may hold while there are free slots."""

    def victims(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        """At most `count` keys, none of `keep`, to make way for keys of `layer`. They must be
        removed."""

    def order(self) -> Iterator[Key]:
        """Every resident key, for checks."""


class _Pools:
    """What the allocations have in common: a pool for each layer, or one for all."""

    pooled = True

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        self.slots = slots
        self.held = [0] * layers
        self.pools = [policy() for _ in range(layers)]

    def step(self, layer: int) -> None:
        self.pools[layer].step()
        self.changed(layer)

    def insert(self, key: Key, weight: float) -> None:
        self.held[key[0]] += 1
        self.pools[key[0]].insert(key, weight)
        self.changed(key[0])

    def use(self, key: Key, weight: float) -> None:
        self.pools[key[0]].use(key, weight)

    def remove(self, key: Key) -> None:
        self.held[key[0]] -= 1
        self.pools[key[0]].remove(key)

    def clear(self) -> None:
        for pool in self.pools:
            pool.clear()
        self.held = [0] * len(self.held)

    def changed(self, layer: int) -> None:
        pass

    def room(self, layer: int) -> int:
        return self.slots

    def order(self) -> Iterator[Key]:
        for pool in dict.fromkeys(self.pools):
            yield from pool.victims()


class Global(_Pools):
    """One pool. Simple, and for comparison: it starves deep layers."""

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(slots, layers, policy)
        self.pools = [self.pools[0]] * layers

    def step(self, layer: int) -> None:
        if layer == 0:  # once a token
            self.pools[0].step()

    def victims(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        return _first(self.pools[0], count, keep)


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

    def victims(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        if self.held[layer] or not self._too_few:
            return _first(self.pools[layer], count, keep)
        for _, giver in sorted((-held, giver) for giver, held in enumerate(self.held)):
            if found := _first(self.pools[giver], 1, keep):
                return found
        return []


class Shared(_Pools):
    """One pool in which every layer's first victim is compared with every other's."""

    def __init__(self, slots: int, layers: int, policy: Callable[[], Policy]) -> None:
        super().__init__(slots, layers, policy)
        self._worth = [inf] * layers  # of the first victim of each layer
        self._changed = set(range(layers))

    def changed(self, layer: int) -> None:
        self._changed.add(layer)

    def clear(self) -> None:
        super().clear()
        self._worth = [inf] * len(self.held)
        self._changed = set(range(len(self.held)))

    def victims(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        worth, found = self._worth, list[Key]()
        open_pools: dict[int, tuple[Key, Iterator[Key]]] = {}
        for changed in self._changed:
            self._open(changed, keep, open_pools)
        self._changed.clear()
        while len(found) < count:
            least = min(worth)
            if least == inf:
                break
            giver = _nearest_before(worth, least, layer)
            if giver not in open_pools:
                self._open(giver, keep, open_pools)
            key, rest = open_pools[giver]
            found.append(key)
            self._advance(giver, rest, keep, open_pools)
        return found

    def _open(
        self, layer: int, keep: Container[Key], open_pools: dict[int, tuple[Key, Iterator[Key]]]
    ) -> None:
        self._advance(layer, iter(self.pools[layer].victims()), keep, open_pools)

    def _advance(
        self,
        layer: int,
        rest: Iterator[Key],
        keep: Container[Key],
        open_pools: dict[int, tuple[Key, Iterator[Key]]],
    ) -> None:
        for key in rest:
            if key not in keep:
                open_pools[layer] = key, rest
                self._worth[layer] = self.pools[layer].value(key)
                return
        self._worth[layer] = inf


def _first(pool: Policy, count: int, keep: Container[Key]) -> list[Key]:
    """The first `count` victims of `pool` that need not stay."""
    return list(islice((key for key in pool.victims() if key not in keep), count))


def _nearest_before(worth: list[float], least: float, layer: int) -> int:
    """The layer worth `least` that was served last, `layer` itself being the very last."""
    served = worth[layer::-1]
    if least in served:
        return layer - served.index(least)
    return len(worth) - 1 - worth[:layer:-1].index(least)


ALLOCATIONS: dict[str, type[Shared] | type[Global] | type[Quota]] = {
    "shared": Shared,
    "global": Global,
    "quota": Quota,
}
