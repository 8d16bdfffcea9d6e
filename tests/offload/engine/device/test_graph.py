"""A step runs from Python a few times, is captured once, and is replayed from then on.

Without a GPU the calls are counted, not made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload.generation import graph
from offload.generation.graph import WARM_UPS, Replay


class FakeStream:
    device = torch.device("cpu")

    def wait_stream(self, other: object) -> None:
        pass


class FakeGraph:
    replays = 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        pass

    def replay(self) -> None:
        FakeGraph.replays += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def inside(*_: Any, **__: Any) -> Iterator[None]:
        yield

    FakeGraph.replays = 0
    for name, fake in {
        "Stream": lambda *_: FakeStream(),
        "CUDAGraph": FakeGraph,
        "current_stream": lambda *_: FakeStream(),
        "stream": inside,
        "graph": inside,
        "synchronize": lambda *_: None,
    }.items():
        monkeypatch.setattr(graph.torch.cuda, name, fake)


class Step:
    def __init__(self, fails_at: int = -1) -> None:
        self.runs, self.fails_at = 0, fails_at

    def __call__(self) -> None:
        self.runs += 1
        if self.runs == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")


def replay_of(step: Step, broken: list[int]) -> Replay:
    return Replay(
        step, torch.device("cuda"), torch.Generator, lambda: broken.append(1), lambda _: False
    )


@pytest.mark.usefixtures("cuda")
def test_a_step_is_captured_after_warming_up() -> None:
    step, broken = Step(), []
    replay = replay_of(step, broken)
    for _ in range(WARM_UPS + 3):
        replay()
    assert replay.graph is not None
    assert step.runs == WARM_UPS + 1  # the last one was captured, not run
    assert FakeGraph.replays == 3
    assert not broken


@pytest.mark.usefixtures("cuda")
def test_a_step_that_cannot_be_captured_runs_from_python(caplog: pytest.LogCaptureFixture) -> None:
    step, broken = Step(fails_at=WARM_UPS + 1), []
    replay = replay_of(step, broken)
    for _ in range(WARM_UPS + 3):
        replay()
    assert replay.graph is None
    assert step.runs == WARM_UPS + 1 + 3  # the capture that failed ran nothing
    assert broken == [1]
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text
    assert "cannot be captured" in caplog.text


def test_a_cpu_runs_a_step_from_python() -> None:
    step = Step()
    replay = Replay(step, torch.device("cpu"), torch.Generator, lambda: None, lambda _: False)
    for _ in range(5):
        replay()
    assert step.runs == 5
    assert replay.graph is None


class Starved(Step):
    """A step that raises an error in its first capture."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(WARM_UPS + 1)
        self._error = error

    def __call__(self) -> None:
        self.runs += 1
        if self.runs == self.fails_at:
            raise self._error


@contextlib.contextmanager
def ends_badly(*_: Any, **__: Any) -> Iterator[None]:
    """A capture whose step broke off between forking and joining."""
    try:
        yield
    except BaseException:
        raise RuntimeError("capturing stream has unjoined work")  # noqa: B904


def starved(error: BaseException, asked: list[int], *, spares: bool) -> Replay:
    return Replay(
        Starved(error),
        torch.device("cuda"),
        torch.Generator,
        lambda: None,
        lambda shortage: (asked.append(shortage), spares)[1],
    )


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("badly", [False, True])
@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError("Tried to allocate 20.00 MiB. GPU 0"), 20 << 20),
        (RuntimeError("CUDA error: out of memory"), 0),  # of the driver, making the graph
    ],
)
def test_a_capture_that_lacks_memory_asks_for_it_and_is_made_later(
    monkeypatch: pytest.MonkeyPatch, error: Exception, size: int, badly: bool
) -> None:
    asked: list[int] = []
    replay = starved(error, asked, spares=True)
    for _ in range(WARM_UPS):
        replay()
    with monkeypatch.context() as patch:
        if badly:
            patch.setattr(graph.torch.cuda, "graph", ends_badly)
        with pytest.raises(torch.OutOfMemoryError):
            replay()
    assert asked == [size]
    assert not replay.refused
    replay()
    assert replay.graph is not None


@pytest.mark.usefixtures("cuda")
def test_a_step_whose_capture_finds_no_memory_runs_from_python(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[int] = []
    replay = starved(torch.OutOfMemoryError("Tried to allocate 1.00 MiB"), asked, spares=False)
    for _ in range(WARM_UPS + 3):
        replay()
    assert asked == [1 << 20]
    assert replay.graph is None
    assert "cannot be captured" in caplog.text


@pytest.mark.usefixtures("cuda")
def test_ctrl_c_in_a_capture_reaches_the_caller_however_the_capture_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replay = starved(KeyboardInterrupt(), [], spares=True)
    monkeypatch.setattr(graph.torch.cuda, "graph", ends_badly)
    for _ in range(WARM_UPS):
        replay()
    with pytest.raises(KeyboardInterrupt):
        replay()
    assert not replay.refused


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("around", [KeyboardInterrupt(), torch.OutOfMemoryError("1.00 MiB")])
def test_an_exception_that_the_caller_is_handling_does_not_count_as_the_captures(
    around: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A user's code catches a shortage of memory and asks again."""
    asked: list[int] = []
    replay = starved(RuntimeError("operation not permitted"), asked, spares=True)
    for _ in range(WARM_UPS):
        replay()
    try:
        raise around
    except BaseException:
        replay()
    assert not asked
    assert "not permitted" in replay.refused
    assert "not permitted" in caplog.text
