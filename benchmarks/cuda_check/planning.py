"""How long the kernels that plan a layer take.

Knows: a cache as full as it gets, and tokens that miss as often as asked. Does not know: bytes.

A graph has one token's steps of all layers, as decoding has them. What it decides changes the
state, which is brought back before the next time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.cuda_check.attempt import NotBuiltError
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import QWEN3
from benchmarks.cuda_check.store import Row
from benchmarks.cuda_check.timing import captured, median_seconds
from offload.cache.cache import CacheState, ExpertCache
from offload.cache.policies import POLICIES
from offload.cache.trace.synthetic import Shape, synthesize

RESIDENT = 0.5
POLICIES_TIMED = ("lfru", "lru")
WARM_UP = 60  # tokens, after which no slot is free
TRUSTED = 1.0  # guesses may evict
PLAN, LOOK_AHEAD = "plan", "look-ahead"
COUNTED = {PLAN: "misses", LOOK_AHEAD: "lookahead_loads"}


def planning_rows(setting: Setting) -> Iterator[Row]:
    """A row for each policy, kernel and number of experts that are not resident."""
    try:
        from offload.engine.device import table  # noqa: F401
    except ImportError as error:
        raise NotBuiltError(str(error)) from None
    layers, experts = setting.pick(QWEN3.layers, 2), setting.pick(QWEN3.experts, 8)
    k = setting.pick(QWEN3.top_k, 2)
    shape = Shape(QWEN3.name, layers, experts, k, 1, 0, 4.0)
    for policy in POLICIES_TIMED[:1] if setting.rehearse else POLICIES_TIMED:
        full = _full(shape, policy, setting.pick(WARM_UP, 12))
        for kernel, absent in ((PLAN, 0), (PLAN, k // 2), (PLAN, k), (LOOK_AHEAD, k)):
            token = _token(shape, policy, full, kernel, absent)
            seconds, right = _seconds(setting, shape, policy, full, kernel, token)
            yield {
                "kind": "planning kernels",
                "model": shape.name,
                "kernel": kernel,
                "policy": policy,
                "slots": len(full.keys),
                "absent": absent,
                "of": k,
                "right": right == absent * layers,
                "us_a_layer": seconds * 1e6 / layers,
                "us_a_token": seconds * 1e6,
            }


def _full(shape: Shape, policy: str, tokens: int) -> CacheState:
    """The state of a cache none of whose slots is free."""
    slots = round(shape.layers * shape.experts * RESIDENT)
    cache = ExpertCache(slots, shape.layers, POLICIES[policy])
    for event in synthesize(shape, QWEN3.routing, tokens).events:
        cache.decide(event.layer, event.experts[0])
    state = cache.state()
    assert None not in state.keys, "not all slots are taken"
    return state._replace(trust=(TRUSTED,) * shape.layers)


def _token(
    shape: Shape, policy: str, full: CacheState, kernel: str, absent: int
) -> list[list[int]]:
    """Experts [L, k], `absent` of each layer's not resident when they are asked for."""
    cache = ExpertCache(len(full.keys), shape.layers, POLICIES[policy])
    cache.adopt(full)
    token = []
    for layer in range(shape.layers):
        resident, others = [], []
        for expert in range(shape.experts):
            (resident if cache.is_resident(layer, expert) else others).append(expert)
        chosen = others[:absent] + resident[: shape.top_k - absent]
        if kernel == PLAN:
            cache.decide(layer, chosen)
        else:
            cache.look_ahead(layer, chosen, most=len(chosen))
        token.append(chosen)
    return token


def _seconds(
    setting: Setting,
    shape: Shape,
    policy: str,
    full: CacheState,
    kernel: str,
    token: list[list[int]],
) -> tuple[float, int]:
    """Seconds of one token's kernels, and how many experts were absent."""
    from offload.engine.device.table import COUNTS, Places, Table

    places = Places(shape.layers, shape.experts, shape.top_k, len(full.keys), policy)
    table = Table(places, setting.device)
    decide = {PLAN: table.decide, LOOK_AHEAD: table.look_ahead}[kernel]
    experts = torch.tensor(token, device=setting.device)  # [L, k]

    def run() -> None:
        for layer, chosen in enumerate(experts):
            decide(layer, shape.experts, chosen)

    def begin() -> None:
        table.upload(full)

    begin()
    replayed = captured(run, setting.device)
    seconds = median_seconds(replayed, setting.device, rounds=setting.pick(9, 1), before=begin)
    counted = table.counts[1:].view(shape.layers, -1)  # of the last round
    return seconds, int(counted[:, COUNTS.index(COUNTED[kernel])].sum())
