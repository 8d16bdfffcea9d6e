"""The part of the GPU check that runs tests: which it finds, and what it tells of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cuda_check import suite
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Store
from benchmarks.cuda_check.suite import MARK, ON_GPU, files_with, verdicts_in

DEVICE = "tests/offload/engine/device/"


def test_tests_that_need_a_gpu_and_tests_that_use_one_are_found() -> None:
    marked = {"test_whole_traces.py", "test_gpu_answers.py"}
    assert {"tests/test_cuda.py", *(DEVICE + name for name in marked)} <= set(files_with(MARK))
    wherever = {"test_whole_traces.py", "test_decisions.py", "test_gather.py"}
    assert {"tests/quant/test_experts.py", *(DEVICE + name for name in wherever)} <= set(
        files_with(ON_GPU)
    )


def test_what_each_file_came_to_is_told_in_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = "import pytest\npytestmark = pytest.mark.gpu\n"
    bodies = {"good": "def test_good(): pass", "bad": "def test_bad(): assert 1 > 2"}
    files = []
    for name, body in bodies.items():
        files.append(str(tmp_path / f"test_{name}.py"))
        Path(files[-1]).write_text(marked + body)
    monkeypatch.setattr(suite, "files_with", lambda sign: files)
    store = Store(tmp_path / "results.json")
    suite.run(Setting(True, tmp_path, 120.0, 0), store.part("tests"))
    part = store.read()["parts"]["tests"]
    (row,) = part["rows"]
    assert (row["files"], row["passed"], row["failed"], row["ended"]) == (2, 1, 1, True)
    assert [note for note in part["notes"] if note.endswith("test_bad")]
    assert "assert 1 > 2" in part["output tail of pytest -m gpu"]


def test_files_for_which_no_time_is_left_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.json")
    suite.run(Setting(True, tmp_path, 0.0, 0), store.part("tests"))
    part = store.read()["parts"]["tests"]
    assert part["rows"][0]["passed"] == 0
    assert not part["rows"][0]["ended"]
    assert "pytest -m gpu: cut short by this part's time" in part["notes"]


def test_what_pytest_said_is_known_even_when_it_was_cut_short() -> None:
    said = """
tests/offload/test_cuda.py::test_one[mixtral] PASSED                     [ 10%]
tests/offload/test_cuda.py::test_two FAILED                              [ 20%]
tests/offload/test_cuda.py::test_three
=================================== ERRORS ====================================
ERROR tests/offload/test_other.py - ModuleNotFoundError: No module named 'hqq'
"""
    assert verdicts_in(said) == [
        ("tests/offload/test_cuda.py::test_one[mixtral]", "PASSED"),
        ("tests/offload/test_cuda.py::test_two", "FAILED"),
        ("tests/offload/test_other.py", "ERROR"),
    ]
