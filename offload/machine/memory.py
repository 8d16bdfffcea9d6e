"""How much RAM this program may use: the machine's, or less in a container (cgroup v1 or v2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload.errors import BudgetError
from offload.units import gib, parse_bytes

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version -> the files of its limit and its use, and the entries of memory.stat that count pages of
# files, which the system gives up when memory runs short.
FILES = {
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


@dataclass(frozen=True)
class Ram:
    """RAM in bytes."""

    total: int
    available: int
    limited: bool = False  # whether a container's limit is less than what the machine has


def ram() -> Ram:
    """The RAM that this program may use."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _limits():
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Ram(total, available, total < machine.total)


def check_ram(size: str | int | None) -> None:
    """Raise `BudgetError` if `size` is more RAM than this machine has."""
    asked, most = parse_bytes(size), ram().total
    if asked is not None and asked > most:
        raise BudgetError(
            f"--ram {size} is more than the {gib(most, 1)} of this machine: lower it, or leave "
            "it out"
        )


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group that this process is in and that has a limit.

    The groups above the process's own count too. A container often sees its own group as the root.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        root = GROUPS / "memory" if controllers else GROUPS
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield from _limit(folder, version)
            if folder == root:
                break


def _limit(folder: Path, version: int) -> Iterator[tuple[int, int]]:
    limit, use, of_files = FILES[version]
    try:
        most, used = ((folder / name).read_text(encoding="utf-8") for name in (limit, use))
        stat = (folder / "memory.stat").read_text(encoding="utf-8")
        counts = dict(line.split() for line in stat.splitlines())
        if most.strip() != "max":
            yield int(most), int(used) - sum(int(counts.get(name, 0)) for name in of_files)
    except (OSError, ValueError):  # there is no such group here, or it has no limit
        return
