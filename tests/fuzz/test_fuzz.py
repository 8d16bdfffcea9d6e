"""Hostile input gives only this project's errors, in one line and in time, and opens no other file."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if not sys.platform.startswith("linux"):
    pytest.skip("needs Linux's limits and signals", allow_module_level=True)

import tests.fuzz.run
from offload.quant.errors import OffloadError
from tests.fuzz.choices import Choices
from tests.fuzz.run import MOST_KEPT, MOST_MEMORY, case, make_targets, memory, run
from tests.fuzz.targets import Targets

NAMES = [name.removeprefix("fuzz_") for name, _ in inspect.getmembers(Targets) if "fuzz_" in name]
SHORT, LONG = 60, 6000  # cases of each target: together more than 100,000 in the long run


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def _home(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HOME", str(targets.folder / "home"))


@pytest.mark.filterwarnings("ignore:Passing ContinuousBatchingConfig:FutureWarning")  # fuzzed key
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
    before = memory()
    counts = run(targets, name, range(LONG))
    print(f"{name}: {counts}")
    assert sum(counts.values()) == LONG
    assert memory() - before < MOST_KEPT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder where a case may open files; beside it lie files that it may not open."""
    for folder in ("model", "model-evil"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("")
    (tmp_path / "secret").write_text("")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "secret")
    return tmp_path / "model"


@pytest.mark.parametrize("path", ["../secret", "../model-evil/file", "link", "x/../../secret"])
def test_an_input_that_opens_another_file_would_be_caught(path: str, model: Path) -> None:
    (model / "x").mkdir()
    with pytest.raises(AssertionError, match="opened"):
        case(lambda _: open(f"{model}/{path}").close(), b"", model)  # noqa: PTH123


@pytest.mark.parametrize("path", ["file", "../model/file"])
def test_an_input_may_open_its_own_files(path: str, model: Path) -> None:
    assert case(lambda _: (model / path).read_text(), b"", model) == "fine"


def test_an_input_that_takes_too_much_memory_would_be_caught(model: Path) -> None:
    def refuse(_: Choices) -> None:
        try:
            bytes(2 * MOST_MEMORY)
        except MemoryError as error:
            raise OffloadError("it is damaged") from error

    with pytest.raises(MemoryError):
        case(lambda _: bytes(2 * MOST_MEMORY), b"", model)
    with pytest.raises(AssertionError, match="took more than"):
        case(refuse, b"", model)
    assert len(bytes(2 * MOST_MEMORY)) > 0  # what comes afterwards is not limited


def test_an_input_that_never_ends_would_be_caught(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tests.fuzz.run, "ENDLESS", 0.2)

    def go_on(_: Choices) -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.001)

    with pytest.raises(AssertionError, match="did not end"):
        case(go_on, b"", model)
