"""Which engine a model gets, and what is said when it is not the one that was asked for."""

from __future__ import annotations

import pytest
from offload.quant.errors import OffloadError

from offload.engine.device.engine import DeviceEngine
from offload.engine.handle import offload_of
from tests.offload.engine.device.conftest import Load


def test_a_cpu_has_the_host_planned_engine(load: Load) -> None:
    assert not isinstance(offload_of(load("mixtral", "auto")).engine, DeviceEngine)


def test_a_cpu_refuses_the_other_in_one_line(load: Load) -> None:
    with pytest.raises(OffloadError, match="needs a CUDA GPU: choose host") as refused:
        load("mixtral", "device")
    assert "\n" not in str(refused.value)


def test_there_is_no_third_engine(load: Load) -> None:
    with pytest.raises(OffloadError, match="auto or host or device"):
        load("mixtral", "gpu")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"policy": "slru"}, "policies lru, fifo, lfru, not slru"),
        ({"allocation": "quota"}, "allocations shared, global, not quota"),
        ({"layers_ahead": 2}, "looks ahead one layer"),
        ({"predictor": "previous"}, "looks ahead one layer"),
        ({"expert_slots": 3}, "needs 4 expert slots and there are 3"),
    ],
)
def test_what_the_kernels_do_not_know_is_told(
    load: Load, options: dict[str, object], why: str
) -> None:
    with pytest.raises(OffloadError, match=why):
        load("mixtral", "device", **options)
