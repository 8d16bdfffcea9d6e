"""The kernels compile for every supported GPU, none at hand, and keep to their registers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.compiled import CAPABILITIES, Found, compiled, names_by_capability, nothing_is_spilled

MODULE = "tests.offload.engine.device.compile_kernels"
KERNELS = {"decide_kernel", "look_ahead_kernel", "gather_kernel"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def can_be_trusted(found: Found) -> None:
    assert names_by_capability(found) == dict.fromkeys(CAPABILITIES, KERNELS)
    nothing_is_spilled(found)
    for one in found:
        assert not one["fused doubles"], "worths would differ from the host's in their last bit"
        if one["kernel"] == "gather_kernel":
            assert one["wide loads"], "loads of less than 16 bytes"


def test_kernels_compile_for_every_generation_without_spills(session_folder: Path) -> None:
    can_be_trusted(compiled(session_folder, MODULE, "usual", CAPABILITIES))


def test_a_kernel_is_compiled_once_for_all_layers(session_folder: Path) -> None:
    """The gather reads the router's choice, of 64 bits, and guesses, of 32."""
    found = compiled(session_folder, MODULE, "usual", CAPABILITIES)
    assert len(found) == (len(KERNELS) + 1) * len(CAPABILITIES)


@pytest.mark.long
def test_kernels_of_every_policy_compile_without_spills(session_folder: Path) -> None:
    can_be_trusted(compiled(session_folder, MODULE, "all", CAPABILITIES))
