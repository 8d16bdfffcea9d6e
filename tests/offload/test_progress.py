"""Long work shows how far it is, in a notebook too, and where nothing can be replaced."""

from __future__ import annotations

import builtins
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from offload.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `Progress` sees; a test sets its only element."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def work(clock: list[float], seconds: float) -> None:
    with Progress("packing demo", total=4_000_000, unit="weights") as progress:
        for _ in range(4):
            clock[0] += seconds
            progress.advance(1_000_000, 2**20)


def test_a_log_gets_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    work(clock, 6.0)
    assert capsys.readouterr().err.splitlines() == [
        "packing demo: 4.0 M weights",
        "packing demo: 50%, 2 MiB, 0.2 M weights/s, 12 s left",
        "packing demo: 100%, 4 MiB, 0.2 M weights/s, 0 s left",
        "packing demo: done in 24.0 s, 0.2 M weights/s, 4 MiB",
    ]


def test_a_notebook_gets_one_line_that_changes(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    def display(data: object, *, raw: bool, display_id: bool) -> object:
        return SimpleNamespace(update=lambda data, *, raw: shown.append(data["text/plain"]))

    shell = type("ZMQInteractiveShell", (), {})()  # a notebook's, by which rich knows it
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    work(clock, 1.0)
    assert shown == [
        "packing demo: 4.0 M weights",
        "packing demo: 25%, 1 MiB, 1.0 M weights/s, 3 s left",
        "packing demo: 50%, 2 MiB, 1.0 M weights/s, 2 s left",
        "packing demo: 75%, 3 MiB, 1.0 M weights/s, 1 s left",
        "packing demo: 100%, 4 MiB, 1.0 M weights/s, 0 s left",
        "packing demo: done in 4.0 s, 1.0 M weights/s, 4 MiB",
    ]
    assert capsys.readouterr().err == ""
