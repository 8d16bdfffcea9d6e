"""Packs are whole though their making is killed, or done by several processes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from offload.options import LoadOptions
from offload.pack import make as making
from offload.pack.find import find_or_make_pack
from offload.quant.manifest import is_pack
from offload.quant.pack import Pack
from tests.children import children
from tests.quant.packs import FORK, contents, needs_fork
from tests.tiny import save_tiny

KILLS = 50  # over all makings of the test
RECIPES = ("experts=4", "q5", "experts=2g16s8,dense=3,embeddings=6")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "checkpoint"
    save_tiny("qwen2_moe", folder, dtype=torch.bfloat16, num_hidden_layers=6)
    return folder


def make(checkpoint: Path, destination: Path, recipe: str) -> None:
    find_or_make_pack(str(checkpoint), LoadOptions(bits=recipe), destination=destination)


def partial_files(destination: Path) -> dict[str, int]:
    """The files that an interrupted making has finished, with the times of their last change."""
    folder = destination.with_name(destination.name + ".partial")
    if not folder.is_dir():
        return {}
    return {
        file.name: file.stat().st_mtime_ns
        for file in folder.iterdir()
        if file.suffix == ".safetensors"
    }


def killed_makings(
    checkpoint: Path, recipe: str, folder: Path, chance: random.Random
) -> Iterator[Path]:
    """Make packs without end, each started again after every kill until it is whole.

    Yields after each kill, and checks that nothing that was finished is made again.
    """
    number, seconds = 0, 0.5
    while True:
        destination = folder / f"pack-{number}"
        number += 1
        while not is_pack(destination):
            before = partial_files(destination)
            child = FORK.Process(target=make, args=(checkpoint, destination, recipe))
            begin = time.perf_counter()
            child.start()
            child.join(chance.uniform(0.0, seconds))
            was_killed = child.is_alive()
            child.kill()
            child.join()
            after = partial_files(destination)
            if not is_pack(destination):
                assert before.items() <= after.items(), "a finished layer was made again"
            if was_killed:
                yield destination
            else:
                assert child.exitcode == 0
                seconds = time.perf_counter() - begin
        yield destination


@needs_fork
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_any_moment_it_goes_on_and_the_pack_is_the_same(
    recipe: str, checkpoint: Path, tmp_path: Path
) -> None:
    make(checkpoint, tmp_path / "whole", recipe)
    expected = contents(tmp_path / "whole")
    chance = random.Random(recipe)
    kills, finished = 0, set()
    for destination in killed_makings(checkpoint, recipe, tmp_path, chance):
        if is_pack(destination):
            finished.add(destination)
        else:
            kills += 1
        if kills >= KILLS / len(RECIPES) and finished:
            break
    for destination in finished:
        assert contents(destination) == expected
        Pack(destination).close()


@needs_fork
def test_two_processes_at_once_make_one_whole_pack(checkpoint: Path, tmp_path: Path) -> None:
    make(checkpoint, tmp_path / "alone", "q4")
    together = tmp_path / "together"
    children = [FORK.Process(target=make, args=(checkpoint, together, "q4")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    assert contents(together) == contents(tmp_path / "alone")


def test_processes_make_the_same_pack_and_leave_none_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(checkpoint, tmp_path / "here", "q4")
    monkeypatch.setattr(making, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    make(checkpoint, tmp_path / "there", "q4")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert not children()


@needs_fork
def test_quantising_processes_end_with_the_one_that_is_killed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    child = FORK.Process(target=make, args=(checkpoint, tmp_path / "pack", "q4"))
    child.start()
    process = psutil.Process(child.pid)
    while not (workers := process.children()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    child.join()
    _, left = psutil.wait_procs(workers, timeout=120)
    assert not left
    make(checkpoint, tmp_path / "pack", "q4")
