"""The kernels decide as the host-planned cache does, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cache.cache import ExpertCache
from cache.policies import POLICIES
from cache.statistics import LayerCounts
from cache.synthetic import Routing, Shape, synthesize
from offload.device.places import Places
from offload.device.table import Table, add_counters

CPU = torch.device("cpu")


class Both:
    """A cache on the host and one in tensors, told the same."""

    def __init__(
        self, slots: int, layers: int, experts: int, k: int, policy: str, allocation: str
    ) -> None:
        self.cache = ExpertCache(slots, layers, POLICIES[policy], allocation)
        self.experts = experts
        self.table = Table(Places(layers, experts, k, slots, policy, allocation), CPU)
        self.table.upload(self.cache.state())

    def plan(self, layer: int, experts: Sequence[int]) -> None:
        chosen = [expert for expert in dict.fromkeys(experts) if expert < self.experts]
        plan = self.cache.plan(layer, chosen)
        self.table.plan(layer, self.experts, torch.tensor(experts))
        assert len(plan.waves) <= 1
        hits = dict(plan.waves[0].hits) if plan.waves else {}
        loads = dict(plan.waves[0].loads) if plan.waves else {}
        assert self.table.hits[layer].tolist() == [hits.get(expert, -1) for expert in experts]
        assert self.table.loads[layer].tolist() == [loads.get(expert, -1) for expert in experts]

    def look_ahead(self, layer: int, experts: Sequence[int]) -> None:
        uses = dict(self.cache.look_ahead(layer, experts, most=len(experts)))
        self.table.look_ahead(layer, self.experts, torch.tensor(experts))
        assert self.table.guess_loads[layer].tolist() == [uses.get(e, -1) for e in experts]
        assert self.table.guesses[layer].tolist() == list(experts)

    def compare(self) -> None:
        """At the end of a token."""
        self.table.check_integrity()
        self.cache.check_integrity()
        mine, theirs = self.table.download(), self.cache.state()
        assert mine.keys == theirs.keys
        assert mine.useless == theirs.useless
        assert mine.trust == theirs.trust
        assert mine.heat == theirs.heat
        counts = [LayerCounts() for _ in theirs.trust]
        add_counters(self.table.counts.tolist()[1:], counts)
        assert counts == self.cache.statistics.layers


def drive(both: Both, shape: Shape, tokens: int, routing: Routing) -> None:
    for event in synthesize(shape, routing, tokens).events:
        both.plan(event.layer, event.experts[0])
        for guess in event.guesses:
            both.look_ahead(guess.layer, guess.experts)
        if event.layer == shape.layers - 1:
            both.compare()


@pytest.mark.parametrize("allocation", ["global", "shared"])
@pytest.mark.parametrize("policy", ["lru", "lfru", "fifo"])
@pytest.mark.parametrize(
    ("layers", "experts", "k", "slots"), [(3, 8, 2, 4), (2, 16, 4, 9), (4, 8, 2, 20), (1, 8, 1, 2)]
)
@pytest.mark.parametrize("recall", [None, 0.7])
def test_kernels_decide_as_the_host_does(
    policy: str, allocation: str, layers: int, experts: int, k: int, slots: int, recall: float
) -> None:
    both = Both(slots, layers, experts, k, policy, allocation)
    shape = Shape("any", layers, experts, k, 1, 1, 4.0)
    drive(both, shape, 12, Routing(recall=recall, seed=slots))
