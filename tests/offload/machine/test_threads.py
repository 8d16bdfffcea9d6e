"""The number of threads follows what other programs leave, and does not swing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offload.machine import threads as threads_module
from offload.machine.threads import LOOK_SECONDS, LOWER_AFTER, RAISE_AFTER, Threads, wanted_threads

CORES = 4


@pytest.mark.parametrize(
    ("now", "others", "wanted"),
    [
        (4, 0.0, 4),
        (4, 0.4, 4),  # a browser that idles
        (4, 1.0, 3),
        (4, 2.6, 1),
        (4, 4.0, 1),  # one thread is always left
        (3, 0.5, 3),  # nearly free is not enough to begin another thread
        (3, 0.2, 4),
        (1, 1.0, 3),
        (1, 3.4, 1),
    ],
)
def test_threads_take_the_cores_that_others_leave(now: int, others: float, wanted: int) -> None:
    assert wanted_threads(4, now, CORES, others) == wanted


def test_cores_beyond_the_threads_are_for_others() -> None:
    assert wanted_threads(8, 8, 16, 7.9) == 8
    assert wanted_threads(8, 8, 16, 10.0) == 6


class Clocks:
    """A machine where other programs use `others` cores, and this process one core."""

    def __init__(self) -> None:
        self.now, self.busy, self.own, self.others = 0.0, 0.0, 0.0, 0.0

    def __call__(self) -> tuple[float, float, float]:
        return self.now, self.busy, self.own

    def pass_time(self) -> None:
        self.now += LOOK_SECONDS
        self.own += LOOK_SECONDS
        self.busy += LOOK_SECONDS * (1 + self.others)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    clocks = Clocks()
    monkeypatch.setattr(threads_module, "clocks", clocks)
    monkeypatch.setattr(threads_module.time, "monotonic", lambda: clocks.now)
    monkeypatch.setattr(threads_module.psutil, "cpu_count", lambda: CORES)
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield clocks
    torch.set_num_threads(before)


def _looks(threads: Threads, clocks: Clocks, count: int) -> list[int]:
    seen = []
    for _ in range(count):
        clocks.pass_time()
        threads.look()
        seen.append(torch.get_num_threads())
    return seen


def test_threads_follow_a_program_that_comes_and_goes(clocks: Clocks) -> None:
    threads = Threads()
    with threads:
        assert _looks(threads, clocks, 3) == [4, 4, 4]
        clocks.others = 2.0
        assert _looks(threads, clocks, LOWER_AFTER) == [4] * (LOWER_AFTER - 1) + [2]
        clocks.others = 0.0
        assert _looks(threads, clocks, RAISE_AFTER) == [2] * (RAISE_AFTER - 1) + [4]
        clocks.others = 3.0
        _looks(threads, clocks, LOWER_AFTER)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4, "what the process had before"
    with threads:
        assert torch.get_num_threads() == 1, "the next answer begins where the last one ended"


def test_a_short_burst_changes_nothing(clocks: Clocks) -> None:
    threads = Threads()
    with threads:
        for _ in range(5):
            clocks.others = 3.0
            assert _looks(threads, clocks, LOWER_AFTER - 1) == [4] * (LOWER_AFTER - 1)
            clocks.others = 0.0
            assert _looks(threads, clocks, 2) == [4, 4]


def test_an_answer_that_is_given_up_leaves_the_number_as_it_was(clocks: Clocks) -> None:
    threads = Threads()
    steps = threads.during(iter(range(100)))
    for _ in range(LOWER_AFTER + 2):
        next(steps)
        clocks.others = 3.0
        clocks.pass_time()
    assert torch.get_num_threads() == 1
    steps.close()
    assert torch.get_num_threads() == 4
