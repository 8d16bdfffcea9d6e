"""A whole trace, queued without waiting for any decision, is decided as on the host.

At a real model's size on a GPU; a small one wherever kernels run.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from offload.cache.cache import CacheState, ExpertCache
from offload.cache.policies import POLICIES
from offload.cache.statistics import LayerCounts
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.cache.trace.trace import Trace
from offload.engine.device.table import Places, Table, add_counters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NONE = -1
WAYS = [("lfru"), ("lru", "global"), ("fifo", "shared")]
SMALL = Shape("small", 3, 8, 2, 1, 1, 4.0)
QWEN3 = Shape("qwen3-30b", 48, 128, 8, 1, 1, 4.0)


class Decided(NamedTuple):
    """What came of T tokens."""

    slots: Tensor  # [T, 3, L, k]: of hits, of loads, of what was guessed; or NONE
    state: CacheState
    counts: list[LayerCounts]


def on_the_host(trace: Trace, slots: int, policy: str) -> Decided:
    layers, k = trace.header.layers, trace.header.top_k
    cache = ExpertCache(slots, layers, POLICIES[policy])
    tokens = len(trace.events) // layers
    said = [[[[NONE] * k for _ in range(layers)] for _ in range(3)] for _ in range(tokens)]
    for at, event in enumerate(trace.events):
        hits, loads, guessed = said[at // layers]
        experts = event.experts[0]
        (wave,) = cache.decide(event.layer, experts).waves
        for row, uses in ((hits, wave.hits), (loads, wave.loads)):
            slot_of = dict(uses)
            row[event.layer] = [slot_of.get(expert, NONE) for expert in experts]
        for guess in event.guesses:
            slot_of = dict(cache.look_ahead(guess.layer, guess.experts, most=k))
            guessed[guess.layer] = [slot_of.get(expert, NONE) for expert in guess.experts]
    cache.check_integrity()
    return Decided(torch.tensor(said), cache.state(), cache.statistics.layers)


def on_the_device(trace: Trace, slots: int, policy: str) -> Decided:
    layers, experts, k = trace.header.layers, trace.header.experts[0], trace.header.top_k
    table = Table(Places(layers, experts, k, slots, policy), DEVICE)
    table.upload(ExpertCache(slots, layers, POLICIES[policy]).state())
    chosen = torch.tensor([event.experts[0] for event in trace.events], device=DEVICE)
    guessed = [event.guesses[0].experts if event.guesses else (NONE,) * k for event in trace.events]
    ahead = torch.tensor(guessed, device=DEVICE)
    said = []
    for at, event in enumerate(trace.events):
        table.decide(event.layer, experts, chosen[at])
        if event.guesses:
            table.look_ahead(event.layer + 1, experts, ahead[at])
        else:  # a token's last layer
            said.append(torch.stack((table.hits, table.loads, table.guess_loads)))
    table.check_integrity()
    counts = [LayerCounts() for _ in range(layers)]
    add_counters(table.counts.tolist()[1:], counts)
    return Decided(torch.stack(said).cpu().long(), table.download(), counts)


def decides_alike(shape: Shape, tokens: int, slots: int, policy: str) -> None:
    trace = synthesize(shape, Routing(stickiness=0.5, skew=1.0, recall=0.85, seed=slots), tokens)
    theirs = on_the_host(trace, slots, policy)
    mine = on_the_device(trace, slots, policy)
    differing = (mine.slots != theirs.slots).flatten(1).any(1)
    assert not differing.any(), f"first at token {int(differing.int().argmax())}"
    assert mine.state.keys == theirs.state.keys
    assert mine.state.useless == theirs.state.useless
    assert mine.state.trust == theirs.state.trust
    assert mine.state.heat == theirs.state.heat
    assert mine.counts == theirs.counts
    assert sum(layer.evictions for layer in theirs.counts), "nobody had to leave"
    assert sum(layer.lookahead_loads for layer in theirs.counts), "no guess was loaded"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_trace_is_decided_as_on_the_host(policy: str) -> None:
    decides_alike(SMALL, 6, 9, policy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_trace_of_a_real_models_size_is_decided_as_on_the_host(policy: str) -> None:
    decides_alike(QWEN3, 200, 3072, policy)
