"""The kernels decide as the host-planned cache does, step by step; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import offload.cache.heat as heat_module
import offload.cache.policies as lfru_module
import offload.engine.device.table as table_module
from offload.cache.cache import ExpertCache
from offload.cache.policies import POLICIES
from offload.cache.statistics import LayerCounts
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.engine.device.table import Places, Table, add_counters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(experts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(experts, device=DEVICE)


class Both:
    """A cache on the host and one in tensors, told the same."""

    def __init__(self, slots: int, layers: int, experts: int, k: int, policy: str) -> None:
        self.cache = ExpertCache(slots, layers, POLICIES[policy])
        self.experts = experts
        self.table = Table(Places(layers, experts, k, slots, policy), DEVICE)
        self.table.upload(self.cache.state())

    def decide(self, layer: int, experts: Sequence[int]) -> None:
        chosen = [expert for expert in dict.fromkeys(experts) if expert < self.experts]
        decision = self.cache.decide(layer, chosen)
        self.table.decide(layer, self.experts, on_device(experts))
        assert len(decision.waves) <= 1
        hits = dict(decision.waves[0].hits) if decision.waves else {}
        loads = dict(decision.waves[0].loads) if decision.waves else {}
        assert self.table.hits[layer].tolist() == [hits.get(expert, -1) for expert in experts]
        assert self.table.loads[layer].tolist() == [loads.get(expert, -1) for expert in experts]

    def look_ahead(self, layer: int, experts: Sequence[int]) -> None:
        uses = dict(self.cache.look_ahead(layer, experts, most=len(experts)))
        self.table.look_ahead(layer, self.experts, on_device(experts))
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
        both.decide(event.layer, event.experts[0])
        for guess in event.guesses:
            both.look_ahead(guess.layer, guess.experts)
        if event.layer == shape.layers - 1:
            both.compare()


@pytest.mark.parametrize(
    ("policy", "layers", "experts", "k", "slots", "recall"),
    [
        ("lfru", 3, 8, 2, 4, 0.7),  # as few slots as there may be
        ("lfru", 2, 16, 4, 20, 0.9),
        ("lfru", 2, 16, 4, 9, 0.2),  # guesses that lose their right to load
        ("lfru", 1, 8, 1, 2, None),
        ("lfru", 3, 8, 2, 9, 0.7),
        ("lru", 3, 8, 2, 9, 0.7),
        ("lru", 4, 8, 2, 9, 0.9),
    ],
)
def test_kernels_decide_as_the_host_does(
    policy: str,
    layers: int,
    experts: int,
    k: int,
    slots: int,
    recall: float | None,
) -> None:
    both = Both(slots, layers, experts, k, policy)
    shape = Shape("any", layers, experts, k, 1, 1, 4.0)
    drive(both, shape, 10, Routing(recall=recall, seed=slots))


def test_slots_are_looked_at_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "CHUNK", 4)
    both = Both(11, 3, 8, 2, "lfru")
    drive(both, Shape("any", 3, 8, 2, 1, 1, 4.0), 8, Routing(recall=0.7))


def test_decides_alike_where_scores_are_scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which happens once in thousands of tokens."""
    for module in (lfru_module, heat_module, table_module):
        monkeypatch.setattr(module, "MOST", 1.2)
    both = Both(7, 3, 8, 2, "lfru")
    drive(both, Shape("any", 3, 8, 2, 1, 1, 4.0), 8, Routing(recall=0.7))


def test_sentinels_and_experts_named_twice_are_passed_over() -> None:
    both = Both(6, 2, 8, 4, "lfru")
    both.decide(0, [3, 8, 3, 1])
    both.decide(1, [8, 8, 8, 8])
    both.compare()
    both.decide(0, [1, 5, 8, 8])
    both.decide(1, [2, 2, 2, 2])
    both.compare()


def test_nothing_is_decided_when_the_sequence_is_over() -> None:
    both = Both(6, 2, 8, 2, "lfru")
    both.decide(0, [3, 1])
    both.decide(1, [2, 5])
    both.table.halted.fill_(1)
    both.table.decide(0, 8, on_device([4, 6]))
    both.table.look_ahead(1, 8, on_device([4, 6]))
    assert both.table.hits[0].tolist() == both.table.loads[0].tolist() == [-1, -1]
    assert both.table.guess_loads[1].tolist() == [-1, -1]
    both.compare()


def test_a_guess_may_evict_before_anything_was_planned_here() -> None:
    both = Both(4, 2, 8, 2, "lfru")
    for layer in (0, 1):
        both.cache.decide(layer, [0, 1])
    state = both.cache.state()._replace(trust=(1.0, 1.0))
    both.cache.adopt(state)
    both.table.upload(state)
    both.look_ahead(1, [2, 3])
    assert int(both.table.guess_loads[1].min()) >= 0


def test_goes_on_from_what_the_host_decided_and_back() -> None:
    both = Both(7, 3, 8, 2, "lfru")
    shape = Shape("any", 3, 8, 2, 1, 1, 4.0)
    drive(both, shape, 6, Routing(recall=0.7))
    state = both.table.download()
    both.cache.adopt(state)
    both.cache.check_integrity()
    both.cache.decide(0, [0, 1, 2, 3, 4, 5], prompt=True)
    both.table.upload(both.cache.state())
    for counts in both.cache.statistics.layers:
        counts.__init__()  # type: ignore[misc]  # the table's begin anew
    drive(both, shape, 6, Routing(recall=0.7, seed=1))


def test_integrity_is_checked() -> None:
    both = Both(6, 2, 8, 2, "lfru")
    both.decide(0, [3, 1])
    both.table.ints[both.table.places.slot_of + 3] = 5
    with pytest.raises(AssertionError):
        both.table.check_integrity()
