"""Renews constraints.txt: `make constraints` runs `python -m tests.constraints`.

pip resolves the newest releases on PyPI that pyproject.toml allows, for the oldest Python that it
allows, since those releases run on newer Pythons too. Nothing is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = (3, 11)
HEAD = """\
# The releases that `make demo` and `make test` install; `make constraints` renews this list.
# torch brings CUDA libraries of its own choice. With CUDA it brings one Triton and no other, which
# is older than the newest; without CUDA it brings none, and the newest of this list is installed.
"""
UNPINNED = ("moe-offload", "pip", "setuptools", "cuda-", "nvidia-")  # beginnings of names


def resolve(*requirements: str) -> dict[str, str]:
    """Name -> version of all that pip would install into an empty environment.

    pip's settings are not read, so that only PyPI's releases are seen.
    """
    options = ["--dry-run", "--ignore-installed", "--report", "-", "-qq"]
    options += ["--use-feature=fast-deps"]  # reads dependencies without downloading torch
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "install", *options, *requirements],
        cwd=ROOT,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        stdout=subprocess.PIPE,
        check=True,
    )
    packages = [install["metadata"] for install in json.loads(done.stdout)["install"]]
    return {package["name"]: package["version"] for package in packages}


def constraints(resolved: dict[str, str], triton: str) -> str:
    """The text of constraints.txt. `triton` is the newest release of Triton."""
    lines = {
        name: f"{name}=={version}\n"
        for name, version in resolved.items()
        if not name.startswith(UNPINNED)
    }
    lines["triton"] = f"triton<={triton}\n"
    return HEAD + "".join(lines[name] for name in sorted(lines, key=str.lower))


if __name__ == "__main__":
    if sys.version_info[:2] != OLDEST:
        sys.exit("Python 3.11 is needed to renew constraints.txt: make PYTHON=python3.11 ...")
    newest = resolve("--no-deps", "triton")["triton"]
    text = constraints(resolve("--editable", ".[dev]"), newest)
    CONSTRAINTS.write_text(text, encoding="utf-8")
