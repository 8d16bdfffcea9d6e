"""Which engine a model gets, and what is said when it is not the one that was asked for."""

from __future__ import annotations

import pytest

from offload.cache import policies
from offload.engine.handle import offload_of
from offload.options import POLICIES
from offload.quant.errors import OffloadError
from tests.offload.engine.device.conftest import Load


def test_a_cpu_has_the_host_planned_engine(load: Load) -> None:
    assert offload_of(load("mixtral", "auto")).engine.device is None


def test_a_cpu_refuses_the_other_in_one_line(load: Load) -> None:
    with pytest.raises(OffloadError, match="needs a CUDA GPU: choose host") as refused:
        load("mixtral", "device")
    assert "\n" not in str(refused.value)


def test_there_is_no_third_engine(load: Load) -> None:
    with pytest.raises(OffloadError, match="auto or host or device"):
        load("mixtral", "gpu")


@pytest.mark.usefixtures("quick")
def test_too_few_slots_for_the_kernels_are_told(load: Load) -> None:
    with pytest.raises(OffloadError, match="needs 4 expert slots and there are 3"):
        load("mixtral", "device", expert_slots=3)


def test_the_kernels_and_the_host_know_every_policy_that_can_be_asked_for() -> None:
    assert set(POLICIES) == set(policies.POLICIES)  # all of which `test_whole_traces` runs on both
