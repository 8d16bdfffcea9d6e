"""Profiles: sane, found by the names people type, and copies cost what they should."""

from __future__ import annotations

import pytest
from offload.cache.simulate.machines import PROFILES, Hardware, find_hardware

ASKED = "3060 3080mobile 3090 4090 2x4090 5070ti 5090 t4 a100"


@pytest.mark.parametrize("name", ASKED.split())
def test_every_card_has_a_profile(name: str) -> None:
    profile = find_hardware(name)
    assert profile is not None
    assert find_hardware(profile.name) is profile


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "GeForce 4090", "rtx-4090"])
def test_names_are_known_as_drivers_and_shops_write_them(name: str) -> None:
    assert find_hardware(name) is PROFILES["RTX 4090"]


def test_an_unknown_name_has_none() -> None:
    assert find_hardware("Voodoo 2") is None


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_memory_is_quicker_than_link_and_link_than_disk(profile: Hardware) -> None:
    assert profile.memory_gb_per_s > 5 * profile.link_gb_per_s
    assert profile.link_gb_per_s > profile.disk_gb_per_s
    assert profile.ram_gb_per_s >= profile.link_gb_per_s * 0.9
    assert profile.copy_seconds(10**6, from_disk=True) > profile.copy_seconds(10**6)


def test_a_copy_is_latency_and_the_slower_of_link_and_ram() -> None:
    slow_ram = Hardware("x", 100.0, 50.0, 10.0, link_latency_seconds=1e-3)
    assert slow_ram.copy_seconds(10**9) == pytest.approx(0.1 + 1e-3)
    slow_link = Hardware("x", 100.0, 5.0, 10.0, link_latency_seconds=0.0)
    assert slow_link.copy_seconds(10**9) == pytest.approx(0.2)
