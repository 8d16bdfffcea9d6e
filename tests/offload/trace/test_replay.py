"""A replay of a trace does exactly what the live engine did; warm starts and look-ahead."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.cache.statistics import LayerCounts
from offload.cache.trace.file import read
from offload.cache.trace.replay import recorded_setup, replay
from offload.engine.handle import offload_of
from offload.engine.history import MOST_USES, read_hot
from offload.options import POLICIES
from tests.full_disk import full_beyond
from tests.tiny import save_tiny

PROMPT = torch.arange(5, 25)[None]


def _load(folder: Path, **options: Any) -> PreTrainedModel:
    model, _ = offload.load(
        folder / "checkpoint", device="cpu", pack_dir=folder / "packs", **options
    )
    return model


def _run(model: PreTrainedModel) -> None:
    for seed in range(2):
        model.generate(PROMPT + seed, max_new_tokens=12, do_sample=False)


def _decisions(layers: tuple[LayerCounts, ...]) -> list[LayerCounts]:
    """What a clock has no part in."""
    return [counts.decisions() for counts in layers]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_replay_agrees_exactly_with_the_live_run(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "checkpoint")
    runs = itertools.product((1, 5, 13), (False, True), POLICIES)
    for slots, lookahead, policy in runs:
        model = _load(
            tmp_path,
            expert_slots=slots,
            lookahead=lookahead,
            policy=policy,
            trace=tmp_path / "trace",
        )
        _run(model)
        offload_of(model).close()
        live = offload_of(model).stats()
        trace = read(tmp_path / "trace")
        outcome = replay(trace, recorded_setup(trace))
        assert _decisions(outcome.layers) == _decisions(live.layers)
        assert trace.tokens == live.tokens
        wrong = live.counts.early_loads_wrong * trace.header.record_bytes[0]
        assert live.counts.dropped or outcome.bytes_loaded == live.bytes_loaded - wrong


def test_replay_with_another_setup_agrees_with_a_live_run_of_it(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    options = {"warm_start": False, "lookahead": False, "expert_slots": 6}
    model = _load(tmp_path, policy="lru", trace=tmp_path / "trace", **options)
    _run(model)
    offload_of(model).close()
    trace = read(tmp_path / "trace")
    other = _load(tmp_path, policy="lfru", **options)
    _run(other)
    offload_of(other).close()
    setup = replace(recorded_setup(trace), policy="lfru")
    assert _decisions(replay(trace, setup).layers) == _decisions(offload_of(other).stats().layers)


def test_a_trace_begun_in_mid_run_is_exact_too(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6, lookahead=True)
    _run(model)
    before = offload_of(model).stats()
    offload_of(model).record(tmp_path / "trace", noted_layers=2)
    _run(model)
    offload_of(model).close()
    live = offload_of(model).stats() - before
    trace = read(tmp_path / "trace")
    outcome = replay(trace, recorded_setup(trace))
    assert (outcome.counts.hits, outcome.counts.misses) == (live.counts.hits, live.counts.misses)
    noted = [guess for event in trace.events for guess in event.guesses if not guess.live]
    assert noted
    assert all(guess.experts for guess in noted)


def test_recording_does_not_change_answers(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6)
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    offload_of(model).record(tmp_path / "trace", noted_layers=3)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, do_sample=False), expected)
    offload_of(model).close()


def test_the_hot_experts_of_the_run_before_are_resident_before_the_first_token(
    tmp_path: Path,
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6)
    _run(model)
    heat = offload_of(model).engine.cache.heat
    hottest = heat.hottest(6)
    offload_of(model).close()
    offload_of(model).close()  # twice is once
    again = _load(tmp_path, expert_slots=6, trace=tmp_path / "trace")
    cache = offload_of(again).engine.cache
    assert all(cache.is_resident(*key) for key in hottest)
    _run(again)
    counts = offload_of(again).stats().counts
    assert counts.warm_loads == 6
    assert counts.hits + counts.misses == counts.requests
    ahead = counts.lookahead_loads + counts.early_loads_wrong
    assert counts.loads == counts.misses + ahead + 6 - counts.dropped
    cache.check_integrity()
    offload_of(again).close()
    trace = read(tmp_path / "trace")
    assert trace.events[0].warmed == tuple(hottest)
    outcome = replay(trace, recorded_setup(trace))
    assert _decisions(outcome.layers) == _decisions(offload_of(again).stats().layers)
    cold = _load(tmp_path, expert_slots=6, warm_start=False)
    assert len(offload_of(cold).engine.cache.table) == 0
    offload_of(cold).close()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"version": 9}',
        '{"version": 1, "hot": [[99, 0, 1.0]]}',
        '{"version": 1, "hot": [[0, 0, NaN], 3]}',
        '{"version": 1, "hot": [[0, 0, -Infinity], [0, 1e400, 1]]}',
        '{"version": 1, "hot": [' + " " * 2**24 + "[0, 0, 1.0]]}",
    ],
)
def test_a_damaged_list_of_hot_experts_is_no_list(content: str, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6)
    hot = offload_of(model).pack.path / "hot.json"
    offload_of(model).close()
    hot.write_text(content)
    again = _load(tmp_path, expert_slots=6)
    assert len(offload_of(again).engine.cache.table) == 0
    _run(again)
    offload_of(again).close()
    assert json.loads(hot.read_text())["hot"], "and the next run has one again"
    assert hot.stat().st_mode & 0o044 == 0o044, "for whoever may read the pack"


def test_heat_beyond_measure_is_cut_and_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6)
    hot, info = offload_of(model).pack.path / "hot.json", offload_of(model).pack.info
    offload_of(model).close()
    hot.write_text('{"version": 1, "hot": [[0, 1, 1e300], [0, 2, 5.0]]}')
    assert read_hot(hot.parent, info) == [(0, 1, MOST_USES), (0, 2, 5.0)]
    hot.unlink()
    os.mkfifo(hot)  # opening it would wait for ever
    assert read_hot(hot.parent, info) == []


def test_a_pack_that_cannot_be_written_has_no_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6)
    _run(model)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("offload.engine.history.write_whole", refuse)
    offload_of(model).close()
    assert not (offload_of(model).pack.path / "hot.json").exists()


def _break_off(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step of the second layer."""

    def interrupt(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offload_of(model).engine.layers[1], "expert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _run(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_agrees_after_a_step_that_broke_off(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6, policy=policy, lookahead=True, trace=tmp_path / "trace")
    _run(model)
    _break_off(model, monkeypatch)
    before = offload_of(model).stats().counts
    _run(model)
    offload_of(model).close()
    live = offload_of(model).stats().counts - before
    trace = read(tmp_path / "trace")
    assert sum(event.fresh for event in trace.events) == 1
    counted: list[LayerCounts] = []
    outcome = replay(
        trace,
        recorded_setup(trace),
        after=lambda cache, *_: counted.append(cache.statistics.total()),
    )
    at = next(i for i, event in enumerate(trace.events) if event.fresh)
    replayed = outcome.counts - counted[at - 1]
    for name in ("hits", "misses", "evictions", "lookahead_guesses", "lookahead_loads_right"):
        assert getattr(replayed, name) == getattr(live, name), name


def test_a_short_run_does_not_forget_what_a_long_one_found_hot(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6)
    _run(model)
    hottest = offload_of(model).engine.cache.heat.hottest(6)
    offload_of(model).close()
    for _ in range(2):
        short = _load(tmp_path, expert_slots=6)
        offload_of(short).close()
    again = _load(tmp_path, expert_slots=6)
    cache = offload_of(again).engine.cache
    assert cache.heat.hottest(6) == hottest
    assert all(cache.is_resident(*key) for key in hottest)
    offload_of(again).close()


def test_an_answer_goes_on_when_the_disk_has_no_room_for_its_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6, warm_start=False)
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    offload_of(model).record(tmp_path / "trace")
    with full_beyond((tmp_path / "trace").stat().st_size + 50):
        answer = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert torch.equal(answer, expected)
    offload_of(model).close()
    assert "the trace ends before the run does" in caplog.text
