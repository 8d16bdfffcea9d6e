"""Forecasts: their range holds what others published, and moves the way machines do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from offload.cache.errors import CacheError
from offload.cache.simulate.forecast import LOCAL, UNIFORM, Forecast, Load, forecast, forecast_of
from offload.cache.simulate.machines import DEVICE_PLANNED, Hardware, find_hardware
from offload.cache.simulate.simulator import Scenario, simulate
from offload.cache.trace.replay import Setup, replay
from offload.cache.trace.synthetic import (
    GPT_OSS_120B,
    MIXTRAL,
    QWEN3_30B,
    Routing,
    Shape,
    synthesize,
)
from offload.cache.trace.trace import Trace

WARM, TOKENS = 80, 160


def card(name: str = "4090") -> Hardware:
    found = find_hardware(name)
    assert found is not None
    return found


def of(
    shape: Shape, share: float, hardware: Hardware | None = None, *, on_device: bool = False
) -> Forecast:
    slots = round(shape.layers * shape.experts * share)
    return forecast(Load(shape, hardware or card(), slots, on_device=on_device))


def hit_rate(experts: int, top_k: int, share: float, routing: Routing) -> float:
    """LRU's, once its slots are full."""
    shape = Shape("x", 2, experts, top_k, 1, 0, 4.5)
    trace = synthesize(shape, replace(routing, recall=None), TOKENS)
    setup = Setup(round(2 * experts * share), "lru")
    whole = replay(trace, setup).counts
    before = replay(Trace(trace.header, trace.events[: WARM * 2]), setup).counts
    return (whole.hits - before.hits) / (whole.requests - before.requests)


@pytest.mark.parametrize(
    ("experts", "top_k", "share", "published"),
    [
        (8, 2, 0.25, 0.40),  # Mixtral, arXiv 2312.17238
        (8, 2, 0.50, 0.60),
        (128, 8, 0.05, 0.37),  # Qwen3-30B-A3B, imp
        (128, 8, 0.15, 0.74),
        (128, 8, 0.30, 0.89),
        (128, 8, 0.13, 0.66),  # tinyserve
    ],
)
def test_published_hit_rates_lie_between_the_routings_of_the_range(
    experts: int, top_k: int, share: float, published: float
) -> None:
    low, high = (hit_rate(experts, top_k, share, routing) for routing in (UNIFORM, LOCAL))
    assert low < published < high + 0.03


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3_30B, GPT_OSS_120B], ids=lambda s: s.name)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_few_layers_stand_for_all(shape: Shape, share: float) -> None:
    slots = round(shape.layers * shape.experts * share)
    short = replace(shape, layers=8, dense_bytes=shape.dense_bytes * 8 // shape.layers)
    whole = forecast(Load(short, card(), slots * 8 // shape.layers))
    half = replace(short, layers=4, dense_bytes=short.dense_bytes // 2)
    part = forecast(Load(half, card(), slots * 4 // shape.layers))
    assert whole.usual == pytest.approx(part.usual / 2, rel=0.02)


def test_the_guess_agrees_with_a_simulation_of_all_layers() -> None:
    slots = 64
    scenario = Scenario(card(), Setup(slots, "lfru", lookahead="router"), MIXTRAL.dense_bytes)
    trace = synthesize(MIXTRAL, Routing(recall=0.85), 120)
    simulated = simulate(trace, scenario).decode.tokens_per_s
    assert forecast(Load(MIXTRAL, card(), slots)).usual == pytest.approx(simulated, rel=0.1)


def test_more_residency_is_never_slower_and_the_range_holds_the_guess() -> None:
    speeds = [of(MIXTRAL, share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert [s.usual for s in speeds] == sorted(s.usual for s in speeds)
    for speed in speeds:
        assert speed.low <= speed.usual <= speed.high
    assert speeds[-1].loaded_bytes == 0


def test_what_limits_is_named() -> None:
    assert of(MIXTRAL, 0.25).limited_by == "link"
    assert of(MIXTRAL, 1.0, card("3060")).limited_by == "VRAM"
    assert of(QWEN3_30B, 1.0).limited_by == "Python"
    slots = MIXTRAL.layers * MIXTRAL.experts // 4
    from_disk = forecast(Load(MIXTRAL, card(), slots, ram_bytes=0))
    assert from_disk.limited_by == "disk"
    assert from_disk.usual < of(MIXTRAL, 0.25).usual / 2
    processor = replace(card(), runs_ahead=False)
    assert of(MIXTRAL, 0.25, processor).limited_by == "RAM"


def test_half_of_it_in_ram_is_between_none_and_all() -> None:
    slots = MIXTRAL.layers * MIXTRAL.experts // 4
    held = [0, MIXTRAL.layers * MIXTRAL.layer_bytes // 2, None]
    none, half, everything = (forecast(Load(MIXTRAL, card(), slots, ram)).usual for ram in held)
    assert none < half < everything


def test_a_published_speed_is_within_the_range() -> None:
    """Qwen3-30B-A3B, all resident: up to 196 tokens/s on an RTX 4090, 311 on a 5090."""
    for name, published in (("4090", 196), ("5090", 311)):
        speed = of(QWEN3_30B, 1.0, card(name), on_device=True)
        assert speed.low < published
        assert speed.high == pytest.approx(published, rel=0.05), "nor do we promise more"


def test_what_plans_on_the_card_pays_for_the_starts_of_kernels() -> None:
    tiny = replace(QWEN3_30B, dense_bytes=2**20, record_bytes=2**10)
    speed = of(tiny, 1.0, on_device=True)
    assert speed.limited_by == "launch"
    assert speed.high < 1 / (tiny.layers * DEVICE_PLANNED.start_seconds_per_layer)


def test_the_usual_figure_is_that_of_the_engine_that_serves_it() -> None:
    host, device = (of(QWEN3_30B, 1.0, on_device=there) for there in (False, True))
    assert device.usual > 5 * host.usual
    assert (host.limited_by, device.limited_by) == ("Python", "VRAM")
    assert device.low == host.low, "it may come to that"


def test_several_cards_are_no_slower_than_one() -> None:
    assert of(MIXTRAL, 0.25, card("2x4090")).usual >= of(MIXTRAL, 0.25).usual * 0.95


def test_a_trace_of_the_model_takes_the_place_of_routings() -> None:
    shape = replace(MIXTRAL, layers=4, dense_bytes=MIXTRAL.dense_bytes // 8)
    load = Load(shape, card(), 16)
    sticky = forecast_of(load, synthesize(shape, Routing(0.9, 1.0, 0.9), 60))
    uniform = forecast_of(load, synthesize(shape, Routing(0.0, 0.0, 0.8), 60))
    assert sticky.usual > 1.3 * uniform.usual
    assert sticky.low <= sticky.usual <= sticky.high


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(CacheError, match="2 cards need a layer and a slot each"):
        forecast(Load(replace(MIXTRAL, layers=1), card("2x4090"), 4))
