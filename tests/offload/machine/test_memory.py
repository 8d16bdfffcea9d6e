"""The limit of a container is the RAM: cgroup v1 and v2, seen from inside and from the host."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from offload.budget.budget import available_bytes
from offload.machine import memory
from offload.machine.doctor import memory as memory_findings
from offload.machine.memory import ram
from offload.units import SHARE

MIB = 2**20
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
NONE = {1: "9223372036854771712", 2: "max"}  # how each version writes that there is no limit


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups, and no membership."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "groups"


def member(groups: Path, version: int, path: str) -> None:
    line = f"4:cpu,memory:{path}\n" if version == 1 else f"0::{path}\n"
    (groups.parent / "membership").write_text(f"9:name=systemd:/\n3:cpuset:/\n{line}")


def limit(groups: Path, version: int, path: str, size: object, used: int, files: int) -> None:
    folder = groups / ("memory" if version == 1 else "") / path
    folder.mkdir(parents=True, exist_ok=True)
    most, use, of_files = NAMES[version]
    (folder / most).write_text(f"{size}\n")
    (folder / use).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{of_files} {files}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("place", ["", "a/b"])
def test_the_limit_of_a_container_is_the_ram(version: int, place: str, groups: Path) -> None:
    member(groups, version, "/a/b")  # a container sees its own group as the root, or by its path
    limit(groups, version, place, 900 * MIB, 500 * MIB, 200 * MIB)
    found = ram()
    assert found.limited
    assert found.total == 900 * MIB
    assert found.available == 600 * MIB, "pages of files are given up when memory runs short"


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_of_the_groups_above_counts(version: int, groups: Path) -> None:
    member(groups, version, "/pod/app")
    limit(groups, version, "pod/app", NONE[version], 10 * MIB, 0)
    limit(groups, version, "pod", 700 * MIB, 100 * MIB, 0)
    limit(groups, version, "", NONE[version], 0, 0)
    assert (ram().total, ram().available) == (700 * MIB, 600 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_the_machine_counts(version: int, groups: Path) -> None:
    assert not ram().limited
    member(groups, version, "/")
    limit(groups, version, "", NONE[version], 0, 0)
    assert not ram().limited
    assert ram().total == psutil.virtual_memory().total


def test_budgets_and_doctor_take_the_limit(groups: Path) -> None:
    member(groups, 2, "/")
    limit(groups, 2, "", 900 * MIB, 100 * MIB, 0)
    assert available_bytes(torch.device("cpu"), None) == int(800 * MIB * SHARE)
    finding = next(memory_findings())
    assert finding.value == "900.0 MiB (the limit of this container), 800.0 MiB free"
