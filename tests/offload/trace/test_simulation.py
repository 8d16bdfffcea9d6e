"""Speeds that are simulated from a trace: lines, mistakes, and this machine measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from offload.cache.trace.file import write
from offload.cache.trace.synthetic import MIXTRAL, Routing, synthesize
from offload.cache.trace.trace import Trace
from offload.quant.errors import OffloadError

from offload.machine.measure import measure
from offload.trace.simulate import Question, answer
from tests.cache.chrome import check_chrome_trace


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.trace"
    write(file, small_trace())
    return file


def small_trace() -> Trace:
    return synthesize(replace(MIXTRAL, layers=4), Routing(recall=0.9), 20, prompt_tokens=8)


def simulate(trace: object, hardware: str, **more: Any) -> str:
    return "\n".join(answer(Question(str(trace), hardware, **more)))


def test_prints_speed_waits_link_and_limit(trace_file: Path) -> None:
    out = simulate(trace_file, "rtx 4090", expert_slots="50%")
    assert "28 tokens, on RTX 4090" in out
    for word in ("decode", "prefill", "tokens/s", "limited by", "link", "waited", "16/32 resident"):
        assert word in out


def test_two_cards_and_a_known_model() -> None:
    out = simulate("synthetic:mixtral", "2x4090", lookahead="none")
    assert "2 cards, each" in out
    assert "guesses" not in out


def test_a_disk_is_slower_than_ram(trace_file: Path) -> None:
    def speed(ram: str | None) -> float:
        lines = simulate(trace_file, "3090", ram=ram).splitlines()
        return float(next(line for line in lines if line.startswith("decode")).split()[1])

    assert speed("1GiB") < speed(None)


def test_a_simulated_timeline_is_valid(trace_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    simulate(trace_file, "3060", timeline=file)
    content = json.loads(file.read_text())
    check_chrome_trace(content)
    assert {e["args"]["name"] for e in content["traceEvents"] if e["ph"] == "M"} >= {
        "compute",
        "link 0",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hardware": "abacus"}, "there is no profile of 'abacus': choose RTX 3060"),
        ({"software": "magic"}, "there is no software 'magic'"),
        ({"expert_slots": "many"}, "not a number of expert slots"),
        ({"expert_slots": "1", "hardware": "2x4090"}, "raise --expert-slots"),
        ({"policy": "coin"}, "there is no policy 'coin'"),
        ({"lookahead": "stars"}, "there is no look-ahead 'stars'"),
        ({"timeline": Path("/nowhere/a.json")}, "cannot write the timeline"),
    ],
)
def test_mistakes_are_told(trace_file: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(OffloadError) as told:
        simulate(trace_file, **{"hardware": "a100", **more})
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_trace_that_does_not_say_its_dense_bytes_asks(tmp_path: Path) -> None:
    trace = small_trace()
    write(tmp_path / "bare.trace", replace(trace, header=replace(trace.header, settings={})))
    with pytest.raises(OffloadError, match="--dense 3GiB"):
        simulate(tmp_path / "bare.trace", "a100")
    assert simulate(tmp_path / "bare.trace", "a100", dense="1GiB")


def test_a_missing_file_and_a_wrong_model_are_told() -> None:
    with pytest.raises(OffloadError, match=r"nowhere\.trace"):
        simulate("nowhere.trace", "a100")
    with pytest.raises(OffloadError, match="synthetic:elsewhere"):
        simulate("synthetic:elsewhere", "a100")


def test_this_machine_is_measured() -> None:
    machine = measure(torch.device("cpu"))
    assert not machine.runs_ahead
    assert 0.05 < machine.link_gb_per_s < 2000
    assert 0.05 < machine.memory_gb_per_s < 2000
    assert 0 < machine.launch_seconds < 0.1
    assert machine.name.startswith("this machine")
