"""The check of a GPU machine: rehearsed on the CPU, and what it does when a part fails."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.cuda_check import __main__ as command
from benchmarks.cuda_check import check as checking
from benchmarks.cuda_check import decode as decoding
from benchmarks.cuda_check.attempt import NotBuiltError, attempt
from benchmarks.cuda_check.bounds import Bound, Rates
from benchmarks.cuda_check.check import Check
from benchmarks.cuda_check.comparison import NotEqualError, need_equal, tokens_rows
from benchmarks.cuda_check.decode import Length
from benchmarks.cuda_check.models import RESIDENT, WAYS, _runs
from benchmarks.cuda_check.parts import PARTS, Part
from benchmarks.cuda_check.routing import Routes, drive
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import CASES, MIXTRAL, QWEN3
from benchmarks.cuda_check.sizes import SCHEME
from benchmarks.cuda_check.store import Part as Results
from benchmarks.cuda_check.store import Store
from benchmarks.cuda_check.table import lines
from benchmarks.synthetic_packs import pack_bytes
from offload.cache.trace.synthetic import Routing, Shape, synthesize


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure")
def test_without_cuda_it_says_so_and_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path)]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture
def rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, object]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    parts = ["link", "kernels", *(case.name for case in CASES)]
    only = ["--only", ",".join(parts)]
    assert command.main(["--rehearse", "--out", str(tmp_path), *only]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    report: dict[str, object] = json.loads(file.read_text())
    return report


def test_a_rehearsal_runs_every_part(rehearsed: dict[str, dict[str, dict[str, object]]]) -> None:
    assert rehearsed["rehearsal"]
    for name, part in rehearsed["parts"].items():
        assert part["status"] == "done", name
        assert not [note for note in part["notes"] if "FAILED" in note], name  # type: ignore[attr-defined]
    link = rehearsed["parts"]["link"]["rows"]
    assert {"planning kernels", "gather beside decode kernels"} <= {row["kind"] for row in link}  # type: ignore[attr-defined]
    assert all(row.get("right", True) for row in link)  # type: ignore[attr-defined]
    for case in CASES:
        rows = rehearsed["parts"][case.name]["rows"]
        kinds = {row["kind"] for row in rows}  # type: ignore[attr-defined]
        assert {"model", "decode", "prefill", "logits"} <= kinds
        assert all(row["bit_equal"] for row in rows if row["kind"] == "logits")  # type: ignore[attr-defined]
        tokens = {row["engine"]: row for row in rows if row["kind"] == "tokens"}  # type: ignore[attr-defined]
        assert all(row["equal"] and row["agree"] == 4 for row in tokens.values())
        assert set(tokens) == ({"host", "device", "both"} if case is MIXTRAL else {"host"})


def test_every_residency_is_measured_one_way_before_any_is_another_way(tmp_path: Path) -> None:
    runs = _runs(QWEN3, Setting(False, tmp_path, 80.0, 2**30))
    first = runs[: len(RESIDENT)]
    assert {run.resident for run in first} == set(RESIDENT)
    assert {(run.engine, run.lookahead) for run in first} == {WAYS[0]}
    assert len(runs) == len(set(runs)) == len(WAYS) * len(RESIDENT) - 2  # no guesses at 100%


def test_a_part_that_dies_leaves_what_it_had_measured(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    check = Check(tmp_path / "out", tmp_path / "work", 1000.0, 2**30, rehearse=False)
    results = Store(check.into).part("link")
    results.set("status", "running")
    results.add({"kind": "before", "figure": 1})
    link = next(part for part in PARTS if part.name == "link")
    check._isolated(link, tmp_path / "work", -checking.GRACE_SECONDS)  # no time at all
    part = json.loads(check.into.read_text())["parts"]["link"]
    assert part["status"].startswith("stopped after")
    assert part["rows"] == [{"kind": "before", "figure": 1}]


def _broken(setting: Setting, part: Results) -> None:
    part.add({"kind": "before", "figure": 1})
    raise RuntimeError("the driver is gone")


def test_a_part_that_fails_says_why_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (
        Part("broken", _broken, 20.0),
        Part("whole", lambda setting, part: part.add({"kind": "after", "figure": 2}), None),
    )
    monkeypatch.setattr(checking, "PARTS", parts)
    check = Check(tmp_path / "out", tmp_path, 100.0, 2**30, rehearse=True)
    check.run([])
    done = json.loads(check.into.read_text())["parts"]
    assert done["broken"]["status"].startswith("failed: RuntimeError")
    assert "the driver is gone" in done["broken"]["status"]
    assert done["broken"]["rows"] == [{"kind": "before", "figure": 1}]
    assert done["whole"]["status"] == "done"
    assert "the driver is gone" in check.report()


def test_a_part_without_time_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "PARTS", (Part("late", _broken, 20.0),))
    check = Check(tmp_path / "out", tmp_path, 1.0, 2**30, rehearse=True)
    check.run([])
    assert json.loads(check.into.read_text())["parts"]["late"]["status"].startswith("not begun")


def test_what_is_not_built_is_said_and_never_a_figure(tmp_path: Path) -> None:
    part = Store(tmp_path / "results.json").part("kernels")
    with attempt(part, "gather"):
        raise NotBuiltError("no such module")
    with attempt(part, "copy"):
        raise ValueError("bad size")
    noted = Store(tmp_path / "results.json").read()["parts"]["kernels"]
    assert noted["rows"] == []
    assert noted["notes"][0] == "gather: not built (no such module)"
    assert noted["notes"][1].startswith("copy: FAILED, ValueError at test_cuda_check.py")


def test_a_token_queued_before_the_clock_starts_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = SimpleNamespace(decoding=None, stats=lambda: 0)
    subject = SimpleNamespace(
        model=None,
        routes=SimpleNamespace(begin=lambda _: None),
        setting=SimpleNamespace(device=torch.device("cpu")),
    )
    steps = [SimpleNamespace(token=token) for token in range(8)]
    clock = iter((10.0, 12.0) * 2)
    for name, fake in {
        "offload_of": lambda _: handle,
        "prompt_ids": lambda *_: [1],
        "stream_generate": lambda *_, **__: iter(steps),
        "time": SimpleNamespace(perf_counter=lambda: next(clock)),
    }.items():
        monkeypatch.setattr(decoding, name, fake)
    length = Length(prompt=1, skipped=1, tokens=6)
    done = decoding.decode(subject, length, 0)  # type: ignore[arg-type]
    assert done.tokens == tuple(range(8))
    assert done.tokens_per_second == 3.0
    monkeypatch.setattr(decoding, "queued_ahead", lambda _: 1)
    assert decoding.decode(subject, length, 0).tokens_per_second == 2.5  # type: ignore[arg-type]


def test_answers_that_differ_are_a_check_that_failed(tmp_path: Path) -> None:
    said = {
        "device-planned, 25% resident": (1, 2, 3),
        "device-planned, 50% resident": (1, 2, 3),
        "host-planned, 25% resident": (1, 2, 4),
    }
    part = Store(tmp_path / "results.json").part("Mixtral")
    rows = list(tokens_rows(said))
    assert [(row["engine"], row["runs"], row["equal"], row["agree"]) for row in rows] == [
        ("device", 2, True, 3),
        ("host", 1, True, 3),
        ("both", 3, False, 2),
    ]
    need_equal(rows[0])
    with pytest.raises(NotEqualError):
        need_equal(rows[2])
    with attempt(part, "tokens"):
        need_equal(rows[2])
    (note,) = Store(tmp_path / "results.json").read()["parts"]["Mixtral"]["notes"]
    assert note.startswith("tokens: FAILED, NotEqualError")
    assert note.endswith("3 answers of 3 tokens agree in the first 2")


def test_a_table_has_a_column_for_whatever_a_row_says() -> None:
    rows = [
        {"kind": "copy", "what": "up", "gb_s": 12.3456},
        {"kind": "copy", "what": "down", "gb_s": 1.0, "of_link_share": 0.5, "target": None},
    ]
    report = {"parts": {"link": {"status": "done", "rows": rows, "notes": ["said so"]}}}
    text = "\n".join(lines(report))
    assert "| copy: what | gb s  | of link | target |" in text
    assert "| up         | 12.35 |         |        |" in text
    assert "| down       | 1     | 50.0%   |        |" in text
    assert "- said so" in text


def test_a_bound_is_the_slower_of_link_and_memory() -> None:
    bound = Bound.of(Rates(link=10.0, memory=100.0), link_bytes=1e9, device_bytes=2e9)
    assert bound.overlapped == pytest.approx(0.1)
    assert bound.in_turn == pytest.approx(0.12)


class Router(nn.Module):
    """Answers as transformers' routers do."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = len(hidden)
        return torch.zeros(tokens, 8), torch.ones(tokens, 2), torch.zeros(tokens, 2).long()


def test_routers_choose_what_the_trace_says_and_guess_what_it_guessed() -> None:
    shape = Shape("tiny", 3, 8, top_k=2, record_bytes=1, dense_bytes=0, expert_bits=4)
    trace = synthesize(shape, Routing(recall=0.5), tokens=5, prompt_tokens=4)
    decoded = [event for event in trace.events if not event.prompt]
    routers = [Router() for _ in range(3)]
    routes = Routes(trace, torch.device("cpu"))
    drive(routers, routes)
    for event in trace.events[:3]:
        chosen = routers[event.layer](torch.zeros(6, 1))[2]  # a longer prompt repeats the trace's
        assert chosen.tolist()[:4] == [list(row) for row in event.experts]
        assert chosen.tolist()[4:] == [list(row) for row in event.experts[:2]]
    for event in (*decoded, *decoded[:3]):  # at its end the trace begins again
        assert routers[event.layer](torch.zeros(1, 1))[2].tolist() == [list(event.experts[0])]
        for guess in event.guesses:
            said = routers[guess.layer].forward(torch.zeros(1, 1))[2]  # not by the model
            assert said.tolist() == [list(guess.experts)]
    routes.begin(4)
    assert routers[0](torch.zeros(1, 1))[2].tolist() == [list(decoded[12].experts[0])]


def test_configs_have_the_shapes_of_the_real_models() -> None:
    sizes = {case.name: pack_bytes(case.config(1), SCHEME) for case in CASES}
    # 4.5 bits a weight, of 3 x 4096 x 14336; 3 x 2048 x 768; 3 x 2880 x 2880 and biases
    assert sizes["Mixtral-8x7B"][1] == 3 * 4096 * 14336 * 9 // 16
    assert sizes["Qwen3-30B-A3B"][1] == 3 * 2048 * 768 * 9 // 16
    assert sizes["gpt-oss-120b"][1] == pytest.approx(3 * 2880 * 2880 * 9 / 16, rel=0.01)
    assert QWEN3.config(48).num_hidden_layers == QWEN3.layers
