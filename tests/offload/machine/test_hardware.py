"""Rates of machines: published ones are found by the names people type, and ours are measured."""

from __future__ import annotations

import pytest
import torch

from offload.machine.hardware import PROFILES, Hardware, find_hardware
from offload.machine.measure import measure

ASKED = "3060 3080mobile 3090 4090 2x4090 5070ti 5090 t4 a100"


@pytest.mark.parametrize("name", ASKED.split())
def test_every_card_has_a_profile(name: str) -> None:
    profile = find_hardware(name)
    assert profile is not None
    assert find_hardware(profile.name) is profile


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "GeForce 4090", "rtx-4090"])
def test_cards_are_found_by_the_names_that_drivers_and_shops_use(name: str) -> None:
    assert find_hardware(name) is PROFILES["RTX 4090"]


def test_an_unknown_name_has_no_profile() -> None:
    assert find_hardware("Voodoo 2") is None


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_memory_is_faster_than_the_link_and_the_link_than_a_disk(profile: Hardware) -> None:
    assert profile.memory_gb_per_s > 5 * profile.link_gb_per_s
    assert profile.link_gb_per_s > profile.disk_gb_per_s
    assert profile.ram_gb_per_s >= profile.link_gb_per_s * 0.9
    assert profile.copy_seconds(10**6, from_disk=True) > profile.copy_seconds(10**6)


def test_a_copy_takes_its_latency_and_the_slower_of_link_and_ram() -> None:
    slow_ram = Hardware("x", 100.0, 50.0, 10.0, link_latency_seconds=1e-3)
    assert slow_ram.copy_seconds(10**9) == pytest.approx(0.1 + 1e-3)
    slow_link = Hardware("x", 100.0, 5.0, 10.0, link_latency_seconds=0.0)
    assert slow_link.copy_seconds(10**9) == pytest.approx(0.2)


def test_this_machine_is_measured() -> None:
    machine = measure(torch.device("cpu"))
    assert not machine.runs_ahead
    assert 0.05 < machine.link_gb_per_s < 2000
    assert 0.05 < machine.memory_gb_per_s < 2000
    assert 0 < machine.launch_seconds < 0.1
    assert machine.name.startswith("this machine")
