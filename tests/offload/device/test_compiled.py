"""The kernels compile for every supported GPU, none at hand, and keep to their registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CAPABILITIES = (75, 80, 86, 89, 90, 120)
SHORT = (89,)  # the others take as long each


@pytest.mark.parametrize(
    "capability",
    [pytest.param(cc, marks=() if cc in SHORT else pytest.mark.long) for cc in CAPABILITIES],
)
def test_kernels_compile_without_spills(capability: int) -> None:
    """In a process of its own: here Triton interprets."""
    environment = {name: at for name, at in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.offload.device.compile_kernels", str(capability)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {found["kernel"] for found in kernels} == {
        "plan_kernel",
        "look_ahead_kernel",
        "gather_kernel",
    }
    for found in kernels:
        assert found["STACK"] == found["LOCAL"] == 0, found
        assert not found["fused"], "worths would differ from the host's in their last bit"
        assert found["wide"] or found["kernel"] != "gather_kernel", "loads of less than 16 bytes"
