"""Enscheme in processes: the same bytes, no process left over, errors that are told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from offload.quant.encode import DeviceEncoder, PendingRecord, chunk_rows, encode_rows
from offload.quant.errors import PackError
from offload.quant.record import MatrixSpec, plan_layout
from offload.quant.scheme import Scheme
from offload.quant.workers import WorkerEncoder

from tests.children import children
from tests.quant.records import encode_record


def test_processes_give_the_bytes_that_one_thread_gives() -> None:
    spec = MatrixSpec("m", 2200, 1024, True, torch.bfloat16)
    torch.manual_seed(0)
    matrices = {"m": (torch.randn(2200, 1024).bfloat16(), torch.randn(2200).bfloat16())}
    assert spec.rows > 2 * chunk_rows(spec.columns)  # or there is nothing to put together
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


def test_a_process_that_is_killed_is_told_of() -> None:
    with WorkerEncoder(1) as encoder:
        os.kill(children()[0].pid, signal.SIGKILL)
        future = encoder.submit(torch.randn(1024, 1024), Scheme(4, 64, 16))
        with pytest.raises(
            PackError, match=r"quantising process ended .* goes on where it stopped"
        ):
            future.result(60)


def test_a_folder_called_quant_where_the_user_works_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quant.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with WorkerEncoder(1) as encoder:
        assert encoder.submit(torch.randn(64, 64), Scheme(8, 64, 16)).result(60).steps is None


INTERRUPTED = """
import sys, time
from offload.quant.workers import WorkerEncoder
with WorkerEncoder(2):
    print("started", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)  # what the processes have to say arrives
sys.exit(130)
"""


@pytest.mark.skipif(os.name == "nt", reason="has no groups of processes")
@pytest.mark.parametrize("after_seconds", [0.05, 0.5])
def test_ctrl_c_while_processes_start_is_not_heard_by_them(after_seconds: float) -> None:
    """Importing torch takes them a second, in which they had no handler yet."""
    terminal = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
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
    assert (terminal.returncode, said) == (130, "")
