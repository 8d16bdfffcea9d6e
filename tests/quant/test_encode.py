"""Encoding in processes gives the same bytes, leaves no process behind and reports what fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from offload.quant.encode import (
    DeviceEncoder,
    PendingRecord,
    WorkerEncoder,
    chunk_rows,
    encode_rows,
)
from offload.quant.errors import PackError
from offload.quant.record import MatrixSpec, plan_layout
from offload.quant.scheme import Scheme
from tests.children import children
from tests.quant.records import encode_record


def test_processes_give_the_bytes_that_one_thread_gives() -> None:
    spec = MatrixSpec("m", 2200, 1024, True, torch.bfloat16)
    torch.manual_seed(0)
    matrices = {"m": (torch.randn(2200, 1024).bfloat16(), torch.randn(2200).bfloat16())}
    assert spec.rows > 2 * chunk_rows(spec.columns)  # otherwise there is only one chunk
    with WorkerEncoder(2) as encoder:
        for scheme in (Scheme(3, 64), Scheme(2, 16, 8)):
            layout = plan_layout((spec,), scheme)
            here, there = torch.full((2, layout.record_bytes), 0xAB, dtype=torch.uint8)
            encode_record(here, layout, matrices)
            PendingRecord(layout, matrices, encoder).write(there)
            assert torch.equal(here, there)


def test_every_dtype_of_weights_reaches_a_process() -> None:
    scheme = Scheme(4, 64, 16)
    with WorkerEncoder(1) as encoder:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(70, 128).to(dtype)
            got, expected = encoder.submit(weight, scheme).result(60), encode_rows(weight, scheme)
            assert torch.equal(got.weight, expected.weight)
            assert torch.equal(got.scales, expected.scales)
            assert got.steps is None


def test_a_device_with_a_thread_of_its_own_gives_the_same_bytes() -> None:
    scheme, weight = Scheme(5, 32, 16), torch.randn(130, 128)
    with contextlib.closing(DeviceEncoder(torch.device("cpu"))) as encoder:
        got, expected = encoder.submit(weight, scheme).result(60), encode_rows(weight, scheme)
    assert torch.equal(got.weight, expected.weight)
    assert torch.equal(got.scales, expected.scales)


def test_no_process_is_left_when_an_error_ends_the_work() -> None:
    def fail() -> None:
        with WorkerEncoder(2) as encoder:
            assert len(children()) == 2
            encoder.submit(torch.randn(1024, 1024), Scheme(4, 64, 16))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not children()


def test_a_process_that_is_killed_ends_the_work_with_a_remedy() -> None:
    def encode_with_a_killed_process() -> None:
        with WorkerEncoder(1) as encoder:
            os.kill(children()[0].pid, signal.SIGKILL)
            encoder.submit(torch.randn(1024, 1024), Scheme(4, 64, 16)).result(60)

    with pytest.raises(PackError, match=r"quantising process ended.* continues where it stopped"):
        encode_with_a_killed_process()
    assert not children()


@pytest.mark.parametrize("name", ["quant.py", "torch.py", "argparse.py", "loky.py"])
def test_a_file_that_is_called_as_a_module_where_the_user_works_is_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with WorkerEncoder(1) as encoder:
        assert encoder.submit(torch.randn(64, 64), Scheme(8, 64, 16)).result(60).steps is None


# Has no `if __name__ == "__main__"`: a quantising process must not run the user's script again.
INTERRUPTED = """
import sys, time
from offload.quant.encode import WorkerEncoder
with WorkerEncoder(2):
    print("started", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)  # gives the processes time to print something
sys.exit(130)
"""


@pytest.mark.skipif(os.name == "nt", reason="has no groups of processes")
@pytest.mark.parametrize("after_seconds", [0.05, 0.5])
def test_ctrl_c_while_processes_start_is_not_heard_by_them(
    after_seconds: float, tmp_path: Path
) -> None:
    """They import torch for a second, during which no handler of ours could be installed."""
    (tmp_path / "script.py").write_text(INTERRUPTED)
    terminal = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert terminal.stdout is not None
    assert terminal.stdout.readline() == "started\n"
    time.sleep(after_seconds)
    os.killpg(terminal.pid, signal.SIGINT)
    _, said = terminal.communicate(timeout=60)
    # loky's tracker rarely warns of a semaphore that was being removed when its process ended.
    ours = [
        line
        for line in said.splitlines()
        if "resource_tracker" not in line and line.strip() != "warnings.warn("
    ]
    assert (terminal.returncode, ours) == (130, [])


KILLED = """
import os, signal, psutil, torch
from offload.quant.encode import WorkerEncoder
from offload.quant.scheme import Scheme
with WorkerEncoder(2) as encoder:
    if WAITS:
        encoder.submit(torch.randn(64, 64), Scheme(4)).result(60)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="has no SIGKILL")
@pytest.mark.parametrize("waits", [True, False])
def test_quantising_processes_end_when_their_parent_is_killed(waits: bool) -> None:
    """This holds whether they wait for work or have not finished starting."""
    script = KILLED.replace("WAITS", str(waits))
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    pids = [int(pid) for pid in started.stdout.readline().split()]
    assert started.wait(60) == -signal.SIGKILL
    assert len(pids) >= 2
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
