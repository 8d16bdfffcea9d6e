"""What programs that compile kernels print, had once a session.

Knows: processes that do not interpret kernels, and that several workers of one session ask for the
same. Does not know: which kernels. Importing torch and Triton takes as long as compiling some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[1]
CAPABILITIES = (75, 80, 86, 89, 90, 120)
Found = list[dict[str, Any]]


def compiled(folder: Path, module: str, which: str, capabilities: tuple[int, ...]) -> Found:
    """The lines that `module` prints for a set of cases; `folder` is of the session."""
    name = "-".join((module, which, *map(str, capabilities)))
    said = folder / f"{name}.jsonl"
    with FileLock(folder / f"{name}.lock"):
        if not said.is_file():
            said.write_text(_run(module, ",".join(map(str, capabilities)), which))
    return [json.loads(line) for line in said.read_text().splitlines()]


def _run(*arguments: str) -> str:
    environment = {name: at for name, at in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:  # nothing that was compiled before is found
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            env={**environment, "TRITON_CACHE_DIR": cache},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def nothing_is_spilled(found: Found) -> None:
    wrong = [one for one in found if one.get("error") or one["STACK"] or one["LOCAL"]]
    assert not wrong


def names_by_capability(found: Found) -> dict[int, set[str]]:
    """Which kernels were compiled for which compute capability."""
    names: dict[int, set[str]] = {}
    for one in found:
        names.setdefault(one["cc"], set()).add(one["kernel"])
    return names
