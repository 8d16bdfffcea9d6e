"""A cache the slow way: every victim is chosen from the whole history, valued anew."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.cache.cache import PROMPT_WEIGHT
from offload.cache.decision import Use
from offload.cache.policies import Key, to_26_bits

LFRU_BONUS = 2.0  # uses that a key of the last step counts more: repeats 1/2 over 1 - 1/growth
LFRU_HALF_LIFE = 1  # powers of two: sums are exact in any order


@dataclass
class Seen:
    """The uses of one key, each with the step of its layer and its weight."""

    uses: list[tuple[int, float]] = field(default_factory=list)


class NaiveCache:
    """Decides hits, misses and victims for steps that fit."""

    def __init__(self, slots: int, layers: int, policy: str, one_pool: bool) -> None:
        self.layers, self.policy, self.one_pool = layers, policy, one_pool
        self.slot_of: dict[Key, int] = {}
        self.free = list(range(slots))
        self.seen: dict[Key, Seen] = {}
        self.steps = [0] * layers

    def decide(self, layer: int, experts: list[int], prompt: bool) -> tuple[list[Use], list[Use]]:
        """The hits and the loads of a step that fits."""
        if self.one_pool:  # one clock for all layers
            self.steps = [step + 1 for step in self.steps]
        else:
            self.steps[layer] += 1
        asked = [(layer, expert) for expert in experts]
        hits = [key for key in asked if key in self.slot_of]
        misses = [key for key in asked if key not in self.slot_of]
        for key in asked:
            if key in self.slot_of:
                self.use(key, prompt)
        slots = [self.free.pop(0) for _ in misses[: len(self.free)]]
        while len(slots) < len(misses):
            slots.append(self.slot_of.pop(self.victim(layer, asked)))
        for key, slot in zip(misses, slots, strict=True):
            self.slot_of[key] = slot
            self.use(key, prompt)
        uses = ([Use(key[1], self.slot_of[key]) for key in keys] for keys in (hits, misses))
        return next(uses), next(uses)

    def use(self, key: Key, prompt: bool) -> None:
        weight = PROMPT_WEIGHT if prompt else 1.0
        self.seen.setdefault(key, Seen()).uses.append((self.steps[key[0]], weight))

    def value(self, key: Key) -> float:
        """What `key` is worth to its own layer."""
        uses, now = self.seen[key].uses, self.steps[key[0]]
        if self.policy == "lru":
            return 1 / (1 + now - uses[-1][0])
        if self.policy == "lfu":
            return sum(weight for _, weight in uses)
        score = sum(weight * 0.5 ** ((now - step) / LFRU_HALF_LIFE) for step, weight in uses)
        return to_26_bits(score) + LFRU_BONUS * (uses[-1][0] == now)

    def victim(self, layer: int, keep: list[Key]) -> Key:
        def order(key: Key) -> tuple[float, int]:
            ahead = key[0] - layer if key[0] > layer else key[0] - layer + self.layers
            pace = 1.0 if self.one_pool else 1 / (ahead / self.layers + 1)
            return self.value(key) * pace, self.slot_of[key]

        return min((key for key in self.slot_of if key not in keep), key=order)
