"""`python -m benchmarks.simulator` as a user meets it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.simulator.__main__ import main
from offload.cache.trace.file import write
from offload.cache.trace.synthetic import MIXTRAL, Routing, synthesize
from offload.cache.trace.trace import Trace
from tests.benchmarks.chrome import check_chrome_trace


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.trace"
    write(file, small_trace())
    return file


def small_trace() -> Trace:
    return synthesize(replace(MIXTRAL, layers=4), Routing(recall=0.9), 20, prompt_tokens=8)


def simulate(*arguments: object) -> int:
    return main([*map(str, arguments)])


def test_prints_speed_waits_link_and_limit(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(trace_file, "--hardware", "rtx 4090", "--expert-slots", "50%") == 0
    out = capsys.readouterr().out
    assert "28 tokens, on RTX 4090" in out
    for word in ("decode", "prefill", "tokens/s", "limited by", "link", "waited", "16/32 resident"):
        assert word in out


def test_two_cards_and_a_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("synthetic:mixtral", "--hardware", "2x4090", "--lookahead", "none") == 0
    out = capsys.readouterr().out
    assert "2 cards, each" in out
    assert "guesses" not in out


def test_a_disk_is_slower_than_ram(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def speed(*more: str) -> float:
        assert simulate(trace_file, "--hardware", "3090", *more) == 0
        row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("decode"))
        return float(row.split()[1])

    assert speed("--ram", "1GiB") < speed()


def test_a_simulated_timeline_is_valid(trace_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    assert simulate(trace_file, "--hardware", "3060", "--timeline", file) == 0
    content = json.loads(file.read_text())
    check_chrome_trace(content)
    assert {e["args"]["name"] for e in content["traceEvents"] if e["ph"] == "M"} >= {
        "compute",
        "link 0",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "abacus"], "there is no profile of 'abacus': choose RTX 2060"),
        (["--software", "magic"], "there is no software 'magic'"),
        (["--expert-slots", "many"], "not a number of expert slots"),
        (["--expert-slots", "1", "--hardware", "2x4090"], "raise --expert-slots"),
        (["--policy", "coin"], "there is no policy 'coin'"),
        (["--lookahead", "stars"], "there is no look-ahead 'stars'"),
        (["--timeline", "/nowhere/a.json"], "cannot write the timeline"),
    ],
)
def test_mistakes_are_told_in_one_line(
    trace_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert simulate(trace_file, "--hardware", "a100", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_trace_that_does_not_say_its_dense_bytes_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = small_trace()
    bare = replace(trace, header=replace(trace.header, settings={}))
    write(tmp_path / "bare.trace", bare)
    assert simulate(tmp_path / "bare.trace", "--hardware", "a100") == 1
    assert "--dense 3GiB" in capsys.readouterr().err
    assert simulate(tmp_path / "bare.trace", "--hardware", "a100", "--dense", "1GiB") == 0


def test_a_missing_file_and_a_wrong_model_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("nowhere.trace", "--hardware", "a100") == 1
    assert simulate("synthetic:elsewhere", "--hardware", "a100") == 1
    assert "nowhere.trace" in capsys.readouterr().err
