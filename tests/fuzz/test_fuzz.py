"""Hostile input: our own errors, in one line, in time, and no file opened elsewhere."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.run import MOST_MEMORY, case, make_targets, peak_memory, run
from tests.fuzz.targets import Targets

NAMES = [name.removeprefix("fuzz_") for name, _ in inspect.getmembers(Targets) if "fuzz_" in name]
SHORT, LONG = 60, 6000  # cases of each target: together more than 100,000 in the long run


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def _home(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HOME", str(targets.folder / "home"))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_input_is_refused_in_one_line(name: str, targets: Targets) -> None:
    target = targets.all()[name]

    @settings(max_examples=SHORT, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=96))
    def try_case(data: bytes) -> None:
        case(target, data, targets.folder)

    try_case()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_much_hostile_input_is_refused_in_one_line(name: str, targets: Targets) -> None:
    before = peak_memory()
    counts = run(targets, name, range(LONG))
    print(f"{name}: {counts}")
    assert sum(counts.values()) == LONG
    assert peak_memory() - before < MOST_MEMORY


def test_an_input_that_opens_another_file_would_be_caught(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    with pytest.raises(AssertionError, match="opened"):
        case(lambda _: other.read_text(), b"", tmp_path / "model")
