"""Peers side by side: one that fails costs its own row, whenever it fails, and no other's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.fake_peer import fake

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # its scripts import each other by their bare names
try:
    from peer_process import Spec
    from peers_check import hold_against_reference
    from peers_report import PAIRS, tables
    from peers_running import Load, PeerError, Run, measure, running
finally:
    sys.path.remove(BENCHMARKS)

LOAD = Load(prompt=4, decode=3, rounds=2, greedy=2, warm=1)
NAMES = ["transformers one", "transformers two", "ours three"]


def texts() -> Iterator[list[int]]:
    while True:
        yield list(range(LOAD.prompt + LOAD.decode))


def run_with(failures: dict[str, str], reference: str = NAMES[0]) -> dict[str, Any]:
    """A whole run as `peers.py` makes it, in which peers fail as told."""
    specs = [
        Spec(name, name.partition(" ")[0], f"16:{failures.get(name, 'never')}") for name in NAMES
    ]
    with running(specs, LOAD, 1, fake) as run:
        hold_against_reference(run, [[1], [2, 3]], LOAD.greedy, str)
        assert run.peers[0].spec.name == reference
        measure(run, texts(), LOAD)
        return as_report(run, reference)


def as_report(run: Run, reference: str) -> dict[str, Any]:
    peers = [
        {
            **vars(peer.spec),
            "prefill_ts": peer.prefill,
            "decode_ts": peer.decode,
            "check": peer.check,
            **peer.facts,
        }
        for peer in run.peers
    ]
    return {
        "load": vars(LOAD),
        "reference": reference,
        "peers": peers,
        "left_out": run.left_out,
    }


@pytest.mark.parametrize(
    "moment",
    ["load", "distributions", "greedy", "timed 1", "timed 2", "timed 3", "facts", "say so at load"],
)
def test_a_peer_that_fails_is_named_and_the_others_are_measured(moment: str) -> None:
    report = run_with({"ours three": moment})
    assert [peer["name"] for peer in report["peers"]] == NAMES[:2]
    assert all(len(peer["decode_ts"]) == LOAD.rounds for peer in report["peers"])
    assert list(report["left_out"]) == ["ours three"]
    shown = tables(report)
    reason = "ValueError: no" if moment.startswith("say") else "its process ended with 3"
    assert f"Left out: ours three: {reason}" in shown
    assert "| transformers two | 1.00 GiB | 0.0000 | 100% | 8.0 | 1.00" in shown


def test_another_of_transformers_is_the_reference_when_the_first_fails() -> None:
    report = run_with({NAMES[0]: "greedy"}, reference=NAMES[1])
    assert [peer["name"] for peer in report["peers"]] == NAMES[1:]
    assert list(report["left_out"]) == [NAMES[0]]


def test_without_a_reference_nothing_is_compared() -> None:
    with pytest.raises(PeerError, match="nothing to hold the others against"):
        run_with({NAMES[0]: "load", NAMES[1]: "greedy"})


def test_a_reference_that_fails_later_leaves_the_others_their_speeds() -> None:
    report = run_with({NAMES[0]: "timed 2"})
    assert [peer["name"] for peer in report["peers"]] == NAMES[1:]
    assert "| ours three | 1.00 GiB | 0.0000 | 100% | 8.0 | - | 12.0 | - |" in tables(report)


def everyone() -> dict[str, Any]:
    """A run in which all of `PAIRS` took part."""
    names = dict.fromkeys(name for pair in reversed(PAIRS) for name in reversed(pair))
    peers = [
        {
            "name": name,
            "memory": 10 * 2**20 if name.startswith("accelerate") else None,
            "rounds": 2 if name.startswith("accelerate") else None,
            "decode": 1 if name.startswith("accelerate") else None,
            "peak_memory": 2**30,
            "prefill_ts": [8.0, 8.0],
            "decode_ts": [4.0, 2.0],
            "check": {"kl_mean": 0.0, "greedy_same": 1.0},
        }
        for name in names
    ]
    return {
        "load": vars(LOAD),
        "reference": "transformers eager, bf16",
        "peers": peers,
        "left_out": {},
    }


def test_a_pair_is_shown_when_both_are_there() -> None:
    shown = tables(everyone())
    for ours, theirs in PAIRS:
        assert f"| {ours} / {theirs} | 1.00 (1.00-1.00) |" in shown


@pytest.mark.parametrize("absent", sorted({name for pair in PAIRS for name in pair}))
def test_any_row_may_be_absent(absent: str) -> None:
    report = everyone()
    report["peers"] = [peer for peer in report["peers"] if peer["name"] != absent]
    shown = tables(report)
    left = [pair for pair in PAIRS if absent not in pair]
    assert shown.count(" / ") == len(left)
    assert f"| {absent} |" not in shown


def test_it_says_what_the_same_memory_is_and_who_ran_less() -> None:
    shown = tables(everyone())
    assert "accelerate eager, bf16, memory of 4 bits 25%: 10 MiB for weights" in shown
    assert "Same memory counts these weights alone." in shown
    assert "2 of 2 rounds, 1 of 3 tokens decoded in each." in shown


def test_ours_is_paired_with_accelerate_in_the_memory_of_the_same_bits() -> None:
    for ours, theirs in PAIRS:
        if theirs.startswith("accelerate"):
            bits = ours.removeprefix("ours, ").partition(",")[0]
            assert f"memory of {bits} " in theirs


def test_what_is_compared_in_the_end_takes_part_and_is_what_its_name_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers as script  # not above: the fakes' processes would import transformers too

    specs = [*script._transformers(), *script._accelerate(), *script._ours()]
    named = {spec.name: spec for spec in specs}
    for name in (name for pair in PAIRS for name in pair if not name.startswith("llama.cpp")):
        assert name in named
    for name, spec in named.items():
        if spec.kind in ("transformers", "accelerate"):
            assert spec.experts is not None
            assert name.startswith(f"{spec.kind} {spec.experts}, bf16")
        if spec.kind == "accelerate":
            assert f"memory of {str(spec.memory_of).removeprefix('experts=')} bits 25%" in name
