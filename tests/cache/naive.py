"""Policies and allocations the slow way: from the whole history, sorted anew at each eviction."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.cache.cache import PROMPT_WEIGHT
from offload.cache.policies import PROTECTED_SHARE, SEGMENT
from offload.cache.policy import Key

LFRU_BONUS = 2.0  # in units, of what was used at the last step: repeats 1/2 over 1 - 1/growth
LFRU_HALF_LIFE = 1  # powers of two: sums are exact in any order


@dataclass
class Seen:
    """What happened to one key."""

    uses: list[tuple[int, int, float]] = field(default_factory=list)  # moment, step, weight
    came: tuple[int, int] = (0, 0)  # moment and step of its last insertion
    protected: bool = False


class NaiveCache:
    """Decides hits, misses and victims for steps that fit."""

    def __init__(self, slots: int, layers: int, policy: str, allocation: str) -> None:
        self.slots, self.layers = slots, layers
        self.policy, self.allocation = policy, allocation
        self.resident: list[Key] = []
        self.seen: dict[Key, Seen] = {}
        self.steps = [0] * layers
        self.moment = 0

    def decide(self, layer: int, experts: list[int], prompt: bool) -> tuple[list[int], list[int]]:
        """The hits and the misses of a step that fits."""
        if self.allocation != "global":
            self.steps[layer] += 1
        elif layer == 0:
            self.steps = [step + 1 for step in self.steps]
        weight = PROMPT_WEIGHT if prompt else 1.0
        asked = [(layer, expert) for expert in experts]
        hits = [key for key in asked if key in self.resident]
        misses = [key for key in asked if key not in self.resident]
        for key in hits:
            self.use(key, weight)
        victims: list[Key] = []
        free = self.slots - len(self.resident)
        if self.allocation == "quota":
            free = min(free, self.quota(layer) - self.held(layer))
        while len(victims) < len(misses) - free:
            victims.append(self.victim(layer, [*asked, *victims]))
        for key in victims:
            self.resident.remove(key)
            self.seen[key].protected = False
        for key in misses:
            self.insert(key, weight)
        return [expert for _, expert in hits], [expert for _, expert in misses]

    def quota(self, layer: int) -> int:
        return max(1, self.slots // self.layers + (layer < self.slots % self.layers))

    def held(self, layer: int) -> int:
        return sum(key[0] == layer for key in self.resident)

    def insert(self, key: Key, weight: float) -> None:
        self.moment += 1
        seen = self.seen.setdefault(key, Seen())
        seen.came = (self.moment, self.steps[key[0]])
        seen.uses.append((self.moment, self.steps[key[0]], weight))
        self.resident.append(key)

    def use(self, key: Key, weight: float) -> None:
        self.moment += 1
        seen = self.seen[key]
        seen.uses.append((self.moment, self.steps[key[0]], weight))
        if self.policy == "slru" and weight == 1:
            seen.protected = True
        if seen.protected:
            pool = [k for k in self.resident if self.allocation == "global" or k[0] == key[0]]
            protected = [k for k in pool if self.seen[k].protected]
            if len(protected) > PROTECTED_SHARE * len(pool):
                oldest = min(protected, key=self.last)
                self.seen[oldest].protected = False
                self.demoted(oldest)

    def demoted(self, key: Key) -> None:
        """In probation it stands behind those that came before it was demoted."""
        self.moment += 1
        _, step, _ = self.seen[key].uses.pop()
        self.seen[key].uses.append((self.moment, step, 0.0))

    def last(self, key: Key) -> int:
        return self.seen[key].uses[-1][0]

    def value(self, key: Key) -> float:
        seen, now = self.seen[key], self.steps[key[0]]
        match self.policy:
            case "lru":
                return 1 / (1 + now - seen.uses[-1][1])
            case "fifo":
                return 1 / (1 + now - seen.came[1])
            case "slru":
                return (SEGMENT if seen.protected else 1) / (1 + now - seen.uses[-1][1])
            case "lfu":
                return sum(weight for _, _, weight in seen.uses)
            case _:
                ages = ((now - step, weight) for _, step, weight in seen.uses)
                score = sum(weight * 0.5 ** (age / LFRU_HALF_LIFE) for age, weight in ages)
                return score + LFRU_BONUS * (seen.uses[-1][1] == now)

    def order(self, key: Key) -> tuple[float, ...]:
        """Where `key` stands among those of its pool."""
        seen = self.seen[key]
        match self.policy:
            case "lru":
                return (0, self.last(key))
            case "fifo":
                return (0, seen.came[0])
            case "slru":
                return (seen.protected, self.last(key))
            case "lfru":
                recent = seen.uses[-1][1] == self.steps[key[0]]
                return (self.value(key), recent, seen.came[0])
            case _:
                return (self.value(key), seen.came[0])

    def victim(self, layer: int, keep: list[Key]) -> Key:
        idle = [key for key in self.resident if key not in keep]
        if self.allocation == "global":
            return min(idle, key=self.order)
        if self.allocation == "quota" and (self.slots >= self.layers or self.held(layer)):
            return min((key for key in idle if key[0] == layer), key=self.order)
        if self.allocation == "quota":  # fewer slots than layers
            by_held = sorted(idle, key=lambda key: (-self.held(key[0]), key[0], self.order(key)))
            return by_held[0]
        givers = {key[0] for key in idle}
        firsts = [min((k for k in idle if k[0] == giver), key=self.order) for giver in givers]
        return min(firsts, key=lambda key: self.worth(layer, key))

    def worth(self, layer: int, key: Key) -> tuple[float, int]:
        """While `layer` is served: the value over a token and the wait for the layer of `key`."""
        ahead = key[0] - layer if key[0] > layer else key[0] - layer + self.layers
        return self.value(key) * (1 / (ahead / self.layers + 1)), key[0]
