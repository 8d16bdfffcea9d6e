"""Records are fetched through a table of addresses; by a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offload.cache.policies import LFRU, POLICIES
from offload.engine.device import make
from offload.engine.device.gather import gather
from offload.engine.device.make import kernels_decide_rightly

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, SLOT = 256 * 131, 256 * 133  # more than one round of all blocks would need padding


def test_missing_records_land_in_their_slots_and_nothing_else_changes() -> None:
    random = torch.Generator().manual_seed(1)
    records = [torch.randint(0, 256, (SIZE,), generator=random, dtype=torch.uint8) for _ in "abcd"]
    if DEVICE.type == "cuda":
        records = [record.pin_memory() for record in records]
    addresses = torch.tensor([record.data_ptr() for record in records], device=DEVICE)
    slots = torch.zeros(5, SLOT, dtype=torch.uint8, device=DEVICE)
    experts, loads = torch.tensor([[3, 0, 1, 8], [4, -1, 0, -1]], device=DEVICE)
    gather(experts, loads, addresses, slots, SIZE)
    slots = slots.cpu()
    assert torch.equal(slots[4, :SIZE], records[3])
    assert torch.equal(slots[0, :SIZE], records[1])
    assert not slots[1:4].any()
    assert not slots[:, SIZE:].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_check_finds_the_kernels_right(policy: str) -> None:
    kernels_decide_rightly.cache_clear()
    assert kernels_decide_rightly(DEVICE, policy) == ""


def test_a_policy_that_the_kernels_do_not_know_is_left_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(POLICIES, "new", lambda: LFRU(half_life=1.0))
    assert "do not decide as the CPU does" in kernels_decide_rightly(DEVICE, "new")


def test_the_check_finds_a_kernel_that_copies_the_wrong_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(experts: Tensor, *rest: Any) -> None:
        gather(experts.flip(0), *rest)

    monkeypatch.setattr(make, "gather", wrong)
    kernels_decide_rightly.cache_clear()
    assert "copy wrong bytes" in kernels_decide_rightly(DEVICE, "lru")
    kernels_decide_rightly.cache_clear()
