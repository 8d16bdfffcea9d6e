"""Forecasts follow the formula, and their range holds what others published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.simulator.compare import GPT_OSS_20B, simulated, workload
from offload.cache.trace.replay import Setup, replay
from offload.cache.trace.synthetic import MIXTRAL, QWEN3_30B, Routing, Shape, synthesize
from offload.cache.trace.trace import Trace
from offload.machine.hardware import Hardware, find_hardware
from offload.plan.forecast import (
    CPU_PASSES,
    GUESS,
    KERNEL_STARTS,
    LAUNCHES,
    LAYER,
    LOCAL,
    RATES,
    SLOW_PYTHON,
    UNIFORM,
    USUAL,
    Forecast,
    Workload,
    forecast,
    hit_rate,
    replayed_hit_rate,
)

# A GB takes a second in memory, two over the link and eight more from the disk; latencies are 0.
SLOW = Hardware(
    "hand",
    memory_gb_per_s=1.0,
    link_gb_per_s=0.5,
    ram_gb_per_s=1.0,
    disk_gb_per_s=0.125,
    link_latency_seconds=0.0,
    disk_latency_seconds=0.0,
    launch_seconds=0.0,
)
GB = 10**9
# 1 layer of 4 experts, top-2, of which 2 are resident: (2 - 1/2) / (4 - 1/2) = 3/7 are hits of
# uniform routing.
SMALL = Workload(1, 4, 2, GB, 3 * GB, 2, SLOW)


def card(name: str = "4090") -> Hardware:
    found = find_hardware(name)
    assert found is not None
    return found


def of(shape: Shape, share: float, name: str = "4090", *, on_device: bool = False) -> Forecast:
    return forecast(replace(workload(shape, card(name), share), on_device=on_device))


def test_a_card_waits_for_the_copies_that_nobody_guessed() -> None:
    misses = 2 * (1 - (3 / 7) ** USUAL.exponent)
    copies, memory = 2 * misses, 3 + 2
    expected = memory + KERNEL_STARTS + (1 - USUAL.recall) * copies
    told = forecast(replace(SMALL, on_device=True))
    assert 1 / told.usual == pytest.approx(expected)
    assert told.loaded_bytes == pytest.approx(misses * GB)
    assert told.limited_by == "VRAM"
    misses = 2 * (1 - 3 / 7)
    slow = (memory + (1 - UNIFORM.recall) * 2 * misses) / RATES
    assert 1 / told.low == pytest.approx(slow)


def test_copies_that_take_longer_than_everything_else_are_the_time_of_a_token() -> None:
    slow_link = replace(SLOW, link_gb_per_s=0.01)
    told = forecast(replace(SMALL, hardware=slow_link))
    assert 1 / told.usual == pytest.approx(200 * (1 - (3 / 7) ** USUAL.exponent))
    assert told.limited_by == "link"


def test_a_cpu_copies_and_multiplies_and_runs_python_one_after_the_other() -> None:
    machine = replace(SLOW, runs_ahead=False)
    told = forecast(replace(SMALL, hardware=machine))
    misses = [2 * (1 - (3 / 7) ** each.exponent) for each in (UNIFORM, USUAL, LOCAL)]
    python = LAYER + GUESS
    low = (2 * misses[0] + CPU_PASSES * 5) / RATES + SLOW_PYTHON * python
    assert 1 / told.low == pytest.approx(low)
    assert 1 / told.usual == pytest.approx(2 * misses[1] + 5 + python)
    assert 1 / told.high == pytest.approx((2 * misses[2] + 5) * RATES + python)
    assert told.limited_by == "RAM"


def test_misses_that_ram_does_not_hold_are_read_from_the_disk_too() -> None:
    told = forecast(replace(SMALL, disk_share=1.0))
    misses = 2 * (1 - (3 / 7) ** USUAL.exponent)
    assert 1 / told.usual == pytest.approx((2 + 8) * misses)
    assert told.limited_by == "disk"


def test_python_and_launches_are_counted_where_the_host_plans() -> None:
    machine = replace(SLOW, memory_gb_per_s=1e6, launch_seconds=1.0)
    told = forecast(replace(SMALL, slots=4, hardware=machine))
    assert 1 / told.usual == pytest.approx(LAYER + 2 * LAUNCHES)
    assert told.limited_by == "Python"


@pytest.mark.parametrize(
    ("experts", "top_k", "share", "published"),
    [
        (8, 2, 0.25, 0.40),  # Mixtral, arXiv 2312.17238
        (8, 2, 0.50, 0.60),
        (128, 8, 0.05, 0.37),  # Qwen3-30B-A3B, imp
        (128, 8, 0.15, 0.74),
        (128, 8, 0.30, 0.89),
        (128, 8, 0.50, 0.96),
        (128, 8, 0.13, 0.66),  # tinyserve
    ],
)
def test_published_hit_rates_lie_between_those_of_the_range(
    experts: int, top_k: int, share: float, published: float
) -> None:
    low, high = (hit_rate(share, experts, top_k, locality) for locality in (UNIFORM, LOCAL))
    assert low < published < high + 0.03


def test_the_usual_hit_rate_is_that_of_a_cache_with_usual_routing() -> None:
    for shape in (MIXTRAL, QWEN3_30B, GPT_OSS_20B):
        few = replace(shape, layers=8)
        trace = synthesize(few, Routing(stickiness=0.3, skew=0.5), 80)
        for share in (0.25, 0.5):
            slots = round(share * 8 * few.experts)
            replayed = replayed_hit_rate(trace, slots)
            told = hit_rate(share, few.experts, few.top_k, USUAL)
            assert told == pytest.approx(replayed, abs=0.12)


def test_the_hit_rate_of_a_trace_is_that_of_its_generated_tokens() -> None:
    trace = synthesize(replace(MIXTRAL, layers=4), Routing(), 60, prompt_tokens=20)
    whole = replay(trace, Setup(16, "lfru")).counts
    prompt = replay(Trace(trace.header, trace.events[:4]), Setup(16, "lfru")).counts
    expected = (whole.hits - prompt.hits) / (whole.requests - prompt.requests)
    assert replayed_hit_rate(trace, 16) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [MIXTRAL, GPT_OSS_20B], ids=lambda shape: shape.name)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", ["3060", "2x4090"])
def test_the_range_holds_the_simulated_speed(shape: Shape, share: float, name: str) -> None:
    few = replace(shape, layers=8, dense_bytes=shape.dense_bytes * 8 // shape.layers)
    work = workload(few, card(name), share)
    told, (_, usual, _) = forecast(work), simulated(few, work)
    assert told.low < usual < told.high * 1.02
    assert told.usual == pytest.approx(usual, rel=0.35)


def test_more_residents_are_never_slower_and_the_range_holds_the_usual_speed() -> None:
    speeds = [of(MIXTRAL, share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert [s.usual for s in speeds] == sorted(s.usual for s in speeds)
    for speed in speeds:
        assert speed.low <= speed.usual <= speed.high
    assert speeds[-1].loaded_bytes == 0


def test_what_limits_the_speed_is_named() -> None:
    assert of(MIXTRAL, 0.25).limited_by == "link"
    assert of(MIXTRAL, 1.0, "3060").limited_by == "VRAM"
    assert of(QWEN3_30B, 1.0).limited_by == "Python"
    from_disk = forecast(replace(workload(MIXTRAL, card(), 0.25), disk_share=1.0))
    assert from_disk.limited_by == "disk"
    assert from_disk.usual < of(MIXTRAL, 0.25).usual / 2


def test_half_of_the_experts_in_ram_is_between_none_and_all() -> None:
    work = workload(MIXTRAL, card(), 0.25)
    speeds = [forecast(replace(work, disk_share=share)).usual for share in (1.0, 0.5, 0.0)]
    assert speeds == sorted(set(speeds))


@pytest.mark.parametrize(("name", "published"), [("4090", 196), ("5090", 311)])
def test_a_published_speed_is_within_the_range(name: str, published: float) -> None:
    """Qwen3-30B-A3B, all resident, with llama.cpp."""
    speed = of(QWEN3_30B, 1.0, name, on_device=True)
    assert speed.low < published
    assert speed.high == pytest.approx(published, rel=0.05), "nor is more promised"


def test_an_engine_on_the_card_pays_for_the_starts_of_kernels() -> None:
    tiny = replace(QWEN3_30B, dense_bytes=2**20, record_bytes=2**10)
    speed = of(tiny, 1.0, on_device=True)
    assert speed.limited_by == "launch"
    assert speed.high < 1 / (tiny.layers * KERNEL_STARTS)


def test_the_usual_speed_is_that_of_the_engine_that_would_run() -> None:
    host, device = (of(QWEN3_30B, 1.0, on_device=there) for there in (False, True))
    assert device.usual > 5 * host.usual
    assert (host.limited_by, device.limited_by) == ("Python", "VRAM")
    assert device.low == host.low, "memory may turn out not to be pinnable"


def test_a_trace_of_the_model_takes_the_place_of_assumed_hits() -> None:
    shape = replace(MIXTRAL, layers=4, dense_bytes=MIXTRAL.dense_bytes // 8)
    work = workload(shape, card(), 0.5)
    sticky = forecast(work, synthesize(shape, Routing(0.9, 1.0, 0.9), 60))
    uniform = forecast(work, synthesize(shape, Routing(0.0, 0.0, 0.8), 60))
    assert sticky.usual > 1.3 * uniform.usual
    assert sticky.low <= sticky.usual <= sticky.high
