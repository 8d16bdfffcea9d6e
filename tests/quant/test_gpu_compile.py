"""Every GPU kernel compiles for every generation of GPUs, without one, and spills no registers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.compiled import CAPABILITIES, compiled, names_by_capability, nothing_is_spilled

MODULE = "tests.quant.compile_kernels"
KERNELS = {"quantised_gemv", "add_parts", "quantised_gemm", "gate_rows"}
PLAIN = {"plain_gemv", "plain_gemm"}
SOME = (75, 89)  # without tensor cores for bfloat16, and with

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_what_a_model_of_four_bits_launches_compiles_for_every_generation_and_spills_nothing(
    session_folder: Path,
) -> None:
    found = compiled(session_folder, MODULE, "usual", CAPABILITIES)
    assert names_by_capability(found) == dict.fromkeys(CAPABILITIES, KERNELS)
    nothing_is_spilled(found)


def test_kernels_of_every_other_width_compile_and_spill_nothing(session_folder: Path) -> None:
    found = compiled(session_folder, MODULE, "widths", SOME)
    assert names_by_capability(found) == dict.fromkeys(SOME, KERNELS | PLAIN)
    nothing_is_spilled(found)


@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_format_compiles_and_spills_nothing(capability: int, session_folder: Path) -> None:
    found = compiled(session_folder, MODULE, "all", (capability,))
    assert names_by_capability(found) == {capability: KERNELS | PLAIN}
    nothing_is_spilled(found)
