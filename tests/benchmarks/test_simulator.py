"""The simulator against cases computed by hand, and against what must hold for any of them."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.simulator.outcome import SimulatedRun
from benchmarks.simulator.simulator import HOST_PLANNED, Scenario, Software, simulate
from benchmarks.simulator.timeline import Timeline
from offload.cache.trace.replay import LIVE, Setup, replay
from offload.cache.trace.synthetic import MIXTRAL, QWEN3_30B, Routing, Shape, synthesize
from offload.cache.trace.trace import CacheError, Event, Guess, Trace, TraceHeader
from offload.machine.hardware import PROFILES, Hardware

# A byte takes a second in device memory, two on the link, eight from disk; nothing else costs.
SLOW = Hardware(
    "hand",
    memory_gb_per_s=1e-9,
    link_gb_per_s=0.5e-9,
    ram_gb_per_s=1.0,
    disk_gb_per_s=0.125e-9,
    link_latency_seconds=0.0,
    disk_latency_seconds=0.0,
    launch_seconds=0.0,
)
FREE = Software("free", 0.0)
RECORD = 10  # bytes: 10 s to compute, 20 s to copy
SMALL = Shape("small", 4, 8, 2, 1_000_000, 8_000_000, 4.5)


def trace_of(layers: int, *rows: tuple[int, ...], guesses: bool = False) -> Trace:
    """Decode steps over layers in turn; with `guesses` each names what really follows."""
    events = []
    for at, row in enumerate(rows):
        layer = at % layers
        following = rows[at + 1] if guesses and layer + 1 < layers else ()
        said = (Guess(layer + 1, following),) if following else ()
        events.append(Event(layer, False, (row,), guesses=said))
    header = TraceHeader("hand", (8,) * layers, len(rows[0]), (RECORD,) * layers)
    return Trace(header, events)


def hand(trace: Trace, slots: int, **more: object) -> SimulatedRun:
    lookahead = str(more.pop("lookahead", "none"))
    cache = Setup(slots, "lru", lookahead=lookahead)
    scenario = Scenario(SLOW, cache, dense_bytes=0.0, software=FREE)
    return simulate(trace, replace(scenario, **more))  # type: ignore[arg-type]


def test_two_loads_on_one_link() -> None:
    # copies end at 20 and 40; products run 20-30 and 40-50
    decode = hand(trace_of(1, (0, 1)), slots=2).decode
    assert decode.seconds == pytest.approx(50)
    assert decode.urgent_wait_seconds == pytest.approx(30)
    assert decode.expert_seconds == pytest.approx(20)
    assert decode.copy_seconds == pytest.approx(40)


def test_resident_experts_wait_for_nothing() -> None:
    decode = hand(trace_of(1, (0, 1), (0, 1), (1, 0)), slots=2).decode
    assert decode.seconds == pytest.approx(50 + 20 + 20)
    assert decode.loads == 2


def test_a_resident_is_computed_while_the_other_arrives() -> None:
    # second step: expert 0 computes 50-60, expert 2 arrives at 70 and computes until 80
    run = hand(trace_of(1, (0, 1), (0, 2)), slots=2)
    assert run.decode.seconds == pytest.approx(80)
    assert run.decode.urgent_wait_seconds == pytest.approx(30 + 10)


def test_one_slot_means_wave_after_wave() -> None:
    # the second copy may begin when the first product is done: 20 + 10 + 20 + 10
    assert hand(trace_of(1, (0, 1)), slots=1).decode.seconds == pytest.approx(60)


def test_the_link_is_saturated_when_nothing_else_costs() -> None:
    quick = replace(SLOW, memory_gb_per_s=1e9)
    rows = [(i % 8, (i + 1) % 8) for i in range(0, 40, 2)]
    run = hand(trace_of(1, *rows), slots=2, hardware=quick)
    assert run.link_use == pytest.approx(1.0)
    assert run.decode.seconds == pytest.approx(20 * len(rows) * 2)
    assert run.decode.limited_by == "the link"


def test_dense_weights_are_read_once_a_token() -> None:
    decode = hand(trace_of(2, (0,), (0,), (0,), (0,)), slots=2, dense_bytes=6.0).decode
    assert decode.dense_seconds == pytest.approx(2 * 6)
    assert decode.tokens == 2


def test_a_layer_that_ram_does_not_hold_comes_from_disk() -> None:
    # layer 0 lies in RAM (20 s), layer 1 on disk (80 + 20 s)
    decode = hand(trace_of(2, (0,), (0,)), slots=2, ram_bytes=8 * RECORD).decode
    assert decode.seconds == pytest.approx(20 + 10 + 100 + 10)
    assert decode.limited_by == "the disk"


def test_two_cards_have_a_link_each() -> None:
    # layer 1's guess is copied by the second card's link while the first is busy with layer 0
    two = replace(SLOW, cards=2)
    trace = trace_of(2, (0,), (0,), guesses=True)
    assert hand(trace, 4, hardware=two, lookahead=LIVE).decode.seconds == pytest.approx(30 + 10)
    assert hand(trace, 4, lookahead=LIVE).decode.seconds == pytest.approx(30 + 10 + 10)


def test_host_work_hides_behind_the_device_or_shows() -> None:
    busy = Software("busy", 100.0)
    trace = trace_of(1, (0,), (0,), (0,))
    # the first step: 100 s of host, 20 of copying, 10 of product; then 100 a step
    ahead = hand(trace, 1, software=busy).decode
    # the host has queued and begins the next layer at 100, is done at 200, 300
    assert ahead.seconds == pytest.approx(310)
    alone = hand(trace, 1, software=busy, hardware=replace(SLOW, runs_ahead=False)).decode
    assert alone.seconds == pytest.approx(20 + 3 * 110)


def test_an_urgent_copy_waits_for_the_rest_of_one_guess_at_most() -> None:
    # Layer 0 loads until 20 and computes until 30, while guess 7 is copied 20-40. Expert 1 of layer
    # 1 is copied 40-60 and computed until 70; guess 6 waits behind it.
    events = [
        Event(0, False, ((0,),), guesses=(Guess(1, (7, 6)),)),
        Event(1, False, ((1,),)),
    ]
    trace = Trace(TraceHeader("hand", (8, 8), 1, (RECORD, RECORD)), events)
    assert hand(trace, 8, lookahead=LIVE).decode.seconds == pytest.approx(70)
    assert hand(trace, 8, lookahead=LIVE, gentle=True).decode.seconds == pytest.approx(60)
    assert hand(trace, 8).decode.seconds == pytest.approx(60)


def wrong(trace: Trace) -> Trace:
    """The same run, guessed wrong on purpose."""

    def lie(event: Event) -> Event:
        guesses = (
            Guess(g.layer, tuple(e for e in range(8) if e not in g.experts)[:2])
            for g in event.guesses
        )
        return event._replace(guesses=tuple(guesses))

    return Trace(trace.header, [lie(event) for event in trace.events])


@pytest.mark.parametrize("slots", [6, 16, 24])
@pytest.mark.parametrize("gb_per_s", [0.5, 2.0, 8.0, 32.0])
def test_a_wrong_predictor_keeps_no_urgent_copy_waiting(gb_per_s: float, slots: int) -> None:
    trace = synthesize(SMALL, Routing(recall=1.0), 300)
    machine = Hardware("card", memory_gb_per_s=20.0, link_gb_per_s=gb_per_s, ram_gb_per_s=50.0)
    base = Scenario(
        machine, Setup(slots, "lru"), SMALL.dense_bytes, replace(HOST_PLANNED, guess_seconds=0.0)
    )
    without = simulate(trace, base)
    looking = replace(base, cache=Setup(slots, "lru", lookahead=LIVE))
    gentle = simulate(wrong(trace), replace(looking, gentle=True))
    assert gentle.counts.lookahead_right == 0
    assert gentle.guess_delay_seconds < 1e-12
    assert gentle.counts.misses <= without.counts.misses
    assert gentle.decode.urgent_wait_seconds <= without.decode.urgent_wait_seconds + 1e-9
    assert gentle.decode.seconds <= without.decode.seconds + 1e-9
    eager = simulate(wrong(trace), looking)
    rest_of_a_copy = machine.copy_seconds(SMALL.record_bytes)
    assert eager.guess_delay_seconds <= eager.counts.misses * rest_of_a_copy


def test_right_guesses_pay() -> None:
    trace = synthesize(SMALL, Routing(recall=0.9), 200)
    machine = Hardware("card", memory_gb_per_s=5.0, link_gb_per_s=2.0, ram_gb_per_s=50.0)
    base = Scenario(machine, Setup(16, "lru"), SMALL.dense_bytes, FREE)
    without = simulate(trace, base).decode
    looking = replace(base, cache=Setup(16, "lru", lookahead=LIVE))
    for gentle in (True, False):
        guessing = simulate(trace, replace(looking, gentle=gentle)).decode
        assert guessing.tokens_per_s > 1.1 * without.tokens_per_s


def card(slots: int = 16, lookahead: str = "none", **more: object) -> Scenario:
    machine = Hardware("card", memory_gb_per_s=300.0, link_gb_per_s=12.0, ram_gb_per_s=50.0)
    scenario = Scenario(machine, Setup(slots, "lru", lookahead=lookahead), SMALL.dense_bytes)
    return replace(scenario, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("lookahead", ["live", "none", "router"])
@pytest.mark.parametrize("policy", ["lru", "lfru", "belady"])
def test_the_cache_does_what_a_replay_says(lookahead: str, policy: str) -> None:
    trace = synthesize(SMALL, Routing(recall=0.8), 60, prompt_tokens=8)
    setup = Setup(12, policy, lookahead=lookahead)
    found = simulate(trace, card(cache=setup)).counts
    assert found.decisions() == replay(trace, setup).counts


@pytest.mark.parametrize("lookahead", ["live", "none"])
def test_bytes_are_loads_times_record_and_time_adds_up(lookahead: str) -> None:
    trace = synthesize(SMALL, Routing(recall=0.8), 100, prompt_tokens=16)
    timeline = Timeline("test")
    run = simulate(trace, card(lookahead=lookahead), timeline)
    phases = (run.decode, run.prefill)
    loads = sum(phase.loads for phase in phases)
    assert loads == run.counts.loads
    assert sum(phase.loaded_bytes for phase in phases) == loads * SMALL.record_bytes
    assert run.decode.tokens == 100
    assert run.prefill.tokens == 16
    end = max(span.begin + span.seconds for span in timeline.spans if span.track == "compute")
    assert run.seconds == pytest.approx(end)
    assert sum(run.decode.shares().values()) == pytest.approx(1.0)


def falls(seconds: list[float]) -> bool:
    return all(after <= before * (1 + 1e-9) for before, after in pairwise(seconds))


def test_more_slots_and_faster_machines_are_never_slower() -> None:
    trace = synthesize(SMALL, Routing(), 200)

    def seconds(**more: Any) -> float:
        return simulate(trace, card(**more)).decode.seconds

    assert falls([seconds(slots=slots) for slots in (2, 8, 16, 32)])
    for name in ("link_gb_per_s", "memory_gb_per_s", "ram_gb_per_s"):
        machines = [replace(card().hardware, **{name: rate}) for rate in (1.0, 8.0, 64.0)]
        assert falls([seconds(hardware=machine) for machine in machines])
    assert falls([seconds(software=Software("x", host)) for host in (1e-3, 1e-4, 0.0)])


def test_the_same_trace_gives_the_same_figures() -> None:
    routing = Routing(recall=0.8, seed=3)
    first = simulate(synthesize(SMALL, routing, 50), card(lookahead=LIVE))
    assert simulate(synthesize(SMALL, routing, 50), card(lookahead=LIVE)) == first


def test_everything_resident_loads_each_expert_once() -> None:
    trace = synthesize(SMALL, Routing(), 200)
    run = simulate(trace, card(slots=32))
    assert run.decode.loads <= 32
    assert run.counts.hit_rate > 0.95


def test_a_prompt_is_limited_by_operations_not_by_bytes() -> None:
    machine = Hardware("card", 300.0, 12.0, 50.0)
    header = TraceHeader("hand", (8,), 2, (1_000_000,))
    trace = Trace(header, [Event(0, True, ((0, 1),) * 100)])
    scenario = Scenario(machine, Setup(8, "lru"), 0.0, FREE, expert_bits=8.0, tflops=1e-3)
    prefill = simulate(trace, scenario).prefill
    assert prefill.expert_seconds == pytest.approx(2 * 2 * 100 * 1e6 / 1e9)
    assert prefill.tokens == 100


def test_fewer_slots_than_cards_is_told() -> None:
    with pytest.raises(CacheError, match="2 cards need a layer and a slot each"):
        hand(trace_of(2, (0,), (0,)), 1, hardware=replace(SLOW, cards=2))


def test_two_thousand_tokens_take_seconds() -> None:
    shape = replace(MIXTRAL, layers=8)
    trace = synthesize(shape, Routing(recall=0.8), 2000)
    begin = time.process_time()
    simulate(trace, card(32, LIVE))
    assert time.process_time() - begin < 20


def test_lines_say_speed_waits_link_and_limit() -> None:
    trace = synthesize(replace(QWEN3_30B, layers=2), Routing(recall=0.8), 10, prompt_tokens=8)
    text = "\n".join(simulate(trace, card(64, LIVE)).lines())
    for word in ("prefill", "tokens/s", "limited by", "busy", "waited", "hits", "precision"):
        assert word in text


@pytest.mark.parametrize(
    ("shape", "record_mib", "rows"), [(MIXTRAL, 94.5, 2), (QWEN3_30B, 2.53, 32)]
)
def test_a_long_prompt_comes_within_a_tenth_of_what_the_link_allows(
    shape: Shape, record_mib: float, rows: int
) -> None:
    """A quarter resident, 2.5 ms between two layers' experts; a few layers stand for all."""
    layers, tokens = 6, 512  # four times the operations a token stand for 2048
    shape = replace(shape, layers=layers, record_bytes=int(record_mib * 2**20))
    hardware = replace(PROFILES["RTX 4090"], link_gb_per_s=26.8)
    tflops = 120 / 4
    slots = layers * shape.experts // 4
    # Of the border 0.47 ms are the host's; the rest is operations.
    dense = 2.0e-3 * tflops * 1e12 / tokens * layers
    both = synthesize(shape, Routing(), 0, 2 * tokens)
    first, second = (
        [event._replace(experts=event.experts[at : at + tokens]) for event in both.events]
        for at in (0, tokens)
    )

    def link_share(early: bool) -> float:
        setup = Setup(slots, "lfru")
        scenario = Scenario(hardware, setup, dense, staging_rows=rows, early=early, tflops=tflops)
        fill = simulate(Trace(both.header, first), scenario).prefill
        whole = simulate(Trace(both.header, [*first, *second]), scenario)
        assert whole.counts.early_loads_wrong <= 0.02 * whole.counts.loads
        needed = whole.prefill.copy_seconds - fill.copy_seconds
        return needed / (whole.prefill.seconds - fill.seconds)

    assert link_share(early=False) < 0.87
    assert link_share(early=True) > 0.9
