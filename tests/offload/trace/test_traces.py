"""`offload trace` and the flags that record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
import offload
import offload.generation.stream
from offload.cache.trace.file import read
from offload.engine.handle import offload_of
from offload.generation.stream import GenerationResponse
from tests.tiny import LAYERS, save_tiny

DEMO = Path(__file__).parents[3] / "benchmarks" / "traces" / "code.trace"


def test_show_tells_the_run_the_text_and_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "show", str(DEMO)]) == 0
    out = capsys.readouterr().out
    assert "30 layers x 8, top-2" in out
    assert "348: 49 of prompts, 299 generated" in out
    assert "recall +3" in out
    assert "lookahead off" in out
    assert "None" not in out
    assert sum(line.startswith("| ") for line in out.splitlines()) == 30 + 3


def test_replay_compares_setups_with_belady(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--policy", "lru,lfru", "--expert-slots", "25%,120", "--lookahead", "none,router"]
    assert cli.main(["trace", "replay", str(DEMO), *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) == 2 * (1 + 4)
    assert [row[0] for row in rows if row[2] == "belady"] == ["60", "120"]
    hits = {(row[0], row[2], row[3]): float(row[4].rstrip("%")) for row in rows}
    assert hits["60", "lfru", ""] < hits["60", "belady", ""] < hits["60", "lfru", "router"]
    assert all(float(row[6].rstrip("%")) <= 100 for row in rows), "nothing beats the optimum"


def test_replay_without_options_repeats_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "replay", str(DEMO), "--per-layer"]) == 0
    out = capsys.readouterr().out
    assert "|    240 |     100% |   lfru |       live |" in out
    assert "layer  29: hits" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nowhere"], "cannot read the trace"),
        (["show", __file__], "not a trace"),
        (["replay", str(DEMO), "--policy", "best"], "no policy 'best'"),
        (["replay", str(DEMO), "--expert-slots", "many", "--policy", "lru"], "'many'"),
        (["replay", str(DEMO), "--lookahead", "far"], "no look-ahead 'far'"),
        (["replay", str(DEMO), "--expert-slots", "0", "--policy", "lru"], "at least one slot"),
        (["show", "synthetic:gpt-9"], "synthetic:gpt-9 is not known"),
        (["show", ""], "a name is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["trace", *arguments]) == 1
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_trace_alone_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace"]) == 2


def test_generate_records_a_trace(
    mixtral_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.trace"
    run = ["generate", str(mixtral_pack), "-p", "Hello", "-n", "6", "--device", "cpu", "-s", "1"]
    assert cli.main([*run, "--expert-slots", "5", "--trace", str(path), "--no-warm-start"]) == 0
    trace = read(path)
    assert trace.header.settings["slots"] == 5
    assert 0 < trace.generated < trace.tokens
    assert all(score <= 1 for event in trace.events for row in event.scores for score in row)
    capsys.readouterr()
    assert cli.main(["trace", "replay", str(path)]) == 0
    assert "lfru" in capsys.readouterr().out


def test_an_interrupted_run_leaves_its_trace_and_its_hot_experts(
    mixtral_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = offload.generation.stream.stream_generate

    def interrupted(*arguments: Any, **options: Any) -> Iterator[GenerationResponse]:
        for _, step in zip(range(3), whole(*arguments, **options), strict=False):
            yield step
        raise KeyboardInterrupt

    monkeypatch.setattr("offload.generation.stream.stream_generate", interrupted)
    pack = shutil.copytree(mixtral_pack, tmp_path / "pack")
    run = ["generate", str(pack), "-p", "Hello", "-n", "6", "--device", "cpu"]
    assert cli.main([*run, "--expert-slots", "5", "--trace", str(tmp_path / "t")]) == 130
    assert (pack / "hot.json").exists()
    trace = read(tmp_path / "t")
    assert len(trace.events) % trace.header.layers == 0
    assert trace.generated >= 2


@pytest.mark.parametrize("slots", [4, None])
@pytest.mark.parametrize("lookahead", [True, False, None])
def test_a_trace_tells_what_routers_said_whether_or_not_it_was_acted_on(
    slots: int | None, lookahead: bool | None, tmp_path: Path
) -> None:
    """Or a replay with look-ahead would show figures of some steps only, and not say so."""
    save_tiny("mixtral", tmp_path / "checkpoint")
    model, _ = offload.load(
        tmp_path / "checkpoint",
        device="cpu",
        expert_slots=slots,
        lookahead=lookahead,
        pack_dir=tmp_path,
        trace=tmp_path / "run.trace",
    )
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    offload_of(model).close()
    events = read(tmp_path / "run.trace").events
    followed = [event for event in events if not event.prompt and event.layer < LAYERS - 1]
    assert followed
    assert all(event.guesses for event in followed)
