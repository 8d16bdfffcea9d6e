"""Which resident expert leaves when a layer needs a slot."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from math import inf
from operator import mul
from typing import cast

from offload.cache.policies import Key, Policy, PoolState, PortablePolicy, Victim


class LayerPools:
    """A pool of keys for each layer; the first victims of all layers are compared.

    Layers are used in turn, so a slot is worth more to a layer that is asked again soon: the worth
    of a key in its pool is multiplied by `pace`. The key of the least product leaves, and of equal
    products the one in the lower slot. `docs/log/policies.md` compares this with one pool for all
    layers and with a fixed share for each layer, which both lose hits.
    """

    def __init__(self, layers: int, policy: Callable[[], Policy]) -> None:
        self.pools = [policy() for _ in range(layers)]
        self._first: list[Victim | None] = [None] * layers  # the first victim of each layer
        self._worth = [inf] * layers  # what that victim is worth in its own pool
        self._changed = set(range(layers))  # layers whose first victim has to be found again
        self._paces = [
            [pace((giver - layer - 1) % layers + 1, layers) for giver in range(layers)]
            for layer in range(layers)
        ]

    def use(self, layer: int, keys: Iterable[Key], weight: float) -> None:
        """A step of `layer` begins, which asks for the resident `keys`."""
        pool = self.pools[layer]
        pool.step()
        pool.use(keys, weight)
        self._changed.add(layer)

    def insert(self, layer: int, keys: Sequence[Key], slots: Sequence[int], weight: float) -> None:
        """`keys` of `layer` became resident in `slots`."""
        self.pools[layer].insert(keys, slots, weight)
        self._changed.add(layer)

    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""
        self.pools[key[0]].remove(key)
        self._changed.add(key[0])

    def clear(self) -> None:
        """Forget all keys: nothing is resident any more."""
        for pool in self.pools:
            pool.clear()
        self._changed.update(range(len(self.pools)))

    def changed(self, layer: int) -> None:
        """The keys of `layer` that must stay are no longer the same."""
        self._changed.add(layer)

    def evict(self, layer: int, count: int, keep: Container[Key]) -> list[Key]:
        """Remove at most `count` keys, none of `keep`, to make way for keys of `layer`."""
        for changed in self._changed:
            self._look(changed, keep)
        self._changed.clear()
        found: list[Key] = []
        paces = self._paces[layer]
        worth = list(map(mul, self._worth, paces))
        while (least := min(worth)) < inf:
            giver = worth.index(least)
            if worth.count(least) > 1:
                equals = (at for at, other in enumerate(worth) if other == least)
                giver = min(equals, key=lambda at: cast(Victim, self._first[at])[1])
            victim = self._first[giver]
            assert victim is not None, "worth something, but no key"
            _, _, key = victim
            self.pools[giver].remove(key)
            found.append(key)
            if len(found) == count:
                self._changed.add(giver)
                break
            self._look(giver, keep)
            worth[giver] = self._worth[giver] * paces[giver]
        return found

    def _look(self, layer: int, keep: Container[Key]) -> None:
        """Find the first victim of `layer` and what it is worth."""
        victim = self._first[layer] = self.pools[layer].first(keep)
        self._worth[layer] = inf if victim is None else victim[0]

    def keys(self) -> Iterator[Key]:
        """Every resident key, for checks."""
        for pool in self.pools:
            yield from pool.keys()

    def states(self) -> tuple[PoolState, ...]:
        """The state of every layer's policy, which has to be portable."""
        return tuple(cast(PortablePolicy, pool).state() for pool in self.pools)

    def adopt(self, states: Sequence[PoolState], slots: Mapping[Key, int]) -> None:
        """Go on from `states`; the keys in `slots` are resident, in these slots."""
        self.clear()
        for pool, state in zip(self.pools, states, strict=True):
            cast(PortablePolicy, pool).adopt(state, slots)


def pace(ahead: int, layers: int) -> float:
    """Weight of an expert's worth when its layer is next asked `ahead` layers from now.

    The weight is 1 / (ahead / layers + 1): a slot that is kept is tied up for `ahead / layers` of a
    token, plus about one token if its expert is not asked for then. With 0.3 to 3 in place of the 1
    the hit rate stays within 0.2 points (docs/log/policies.md).
    """
    return 1.0 / (ahead / layers + 1.0)
