"""Frequency and recency: how likely a key is asked for at its layer's next step.

Knows: uses that count half as much every `half_life` steps, and who was asked for at the last one.
Does not know: how the lowest is found (`cache.policies.ranking`).

P(next) = repeats * [asked for at the last step] + (1 - repeats) * rate, the rate being the decayed
count over its sum of weights. Counts age without being touched: a use counts more the later it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from cache.policies.ranking import Ranking
from cache.policy import Key

HALF_LIFE = 16.0  # steps of a layer, that is tokens; docs/log.md compares others
REPEATS = 0.1  # more of them on models of few experts a layer would be wrong, see docs/log.md
MOST = 2.0**400  # what a use may count before all scores are scaled down


class LFRU:
    """Keys in the order of their decayed uses, those of keys that left included; what was used at
    the last step has a bonus until the next."""

    def __init__(self, half_life: float = HALF_LIFE, repeats: float = REPEATS) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._unit = 1.0  # what a use counts now
        self._bonus = repeats / (1.0 - repeats) / (1.0 - 1.0 / self._growth)  # in units
        self._recent: dict[Key, None] = {}  # used since the last step
        self._ranking = Ranking()

    def step(self) -> None:
        self._recent.clear()
        self._unit *= self._growth
        if self._unit > MOST:
            scores = self._ranking.scores
            for key in scores:
                scores[key] /= self._unit
            self._unit = 1.0
            self._ranking.rebuild()

    def insert(self, key: Key, weight: float = 1.0) -> None:
        self.use(key, weight)
        self._ranking.insert(key)

    def use(self, key: Key, weight: float = 1.0) -> None:
        scores = self._ranking.scores
        scores[key] = scores.get(key, 0.0) + weight * self._unit
        if weight:
            self._recent[key] = None

    def remove(self, key: Key) -> None:
        self._recent.pop(key, None)
        self._ranking.remove(key)

    def clear(self) -> None:
        self._recent.clear()
        self._ranking.clear()

    def victims(self) -> Iterator[Key]:
        recent, scores = self._recent, self._ranking.scores
        bonus = self._bonus * self._unit
        late: list[Key] | None = None  # the recent ones, sorted once one may be next, last first
        for key in self._ranking:
            if key in recent:
                continue
            if scores[key] >= bonus:
                if late is None:
                    late = sorted(recent, key=scores.__getitem__)[::-1]
                while late and scores[late[-1]] + bonus < scores[key]:
                    yield late.pop()
            yield key
        yield from sorted(recent, key=scores.__getitem__) if late is None else reversed(late)

    def value(self, key: Key) -> float:
        score = self._ranking.scores[key] / self._unit
        return score + self._bonus if key in self._recent else score
