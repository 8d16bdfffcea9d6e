"""Every GPU kernel compiles for every generation, with no GPU, and spills no registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = "75,80,86,89,90,120"
KERNELS = {"quantised_gemv", "quantised_gemm", "gate_rows"}
REST = {"add_parts", "plain_gemv", "plain_gemm"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compiled(which: str, capabilities: str, cache: Path) -> list[dict[str, Any]]:
    """What `tests.quant.compile_kernels` finds; in a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.quant.compile_kernels", capabilities, which],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-600:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def nothing_is_spilled(found: list[dict[str, Any]]) -> None:
    wrong = [one for one in found if one.get("error") or one["STACK"] or one["LOCAL"]]
    assert not wrong


def test_four_bit_kernels_compile_for_every_generation_and_spill_nothing(tmp_path: Path) -> None:
    found = compiled("quick", CAPABILITIES, tmp_path)
    assert {one["kernel"] for one in found} == KERNELS
    assert {str(one["cc"]) for one in found} == set(CAPABILITIES.split(","))
    nothing_is_spilled(found)


@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES.split(","))
def test_every_format_compiles_and_spills_nothing(capability: str, tmp_path: Path) -> None:
    found = compiled("all", capability, tmp_path)
    assert {one["kernel"] for one in found} == KERNELS | REST
    nothing_is_spilled(found)
