"""Rates of machines: published ones are found by the names people type, and ours are measured."""

from __future__ import annotations

import pytest
import torch

from offload.machine.cards import CARDS, OTHERS
from offload.machine.hardware import (
    PROFILES,
    SERVERS,
    Hardware,
    find_hardware,
    nearest_hardware,
)
from offload.machine.measure import measure

GIB = 2**30
ASKED = "2080ti 3060 3080mobile 3090 4060 4060ti 4070 4090 2x4090 5070ti 5090 a6000 t4 a100"


@pytest.mark.parametrize("name", ASKED.split())
def test_every_card_that_was_asked_for_has_a_profile(name: str) -> None:
    assert find_hardware(name) is not None


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_profile_is_found_by_its_name_and_no_other(card: object) -> None:
    name = card.name  # type: ignore[attr-defined]
    assert find_hardware(name) is PROFILES[name]
    assert find_hardware(f"NVIDIA GeForce {name} GPU".upper()) is PROFILES[name]


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GeForce 4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("4060ti", "RTX 4060 Ti"),
        ("4060 Ti 8GB", "RTX 4060 Ti"),
        ("3060 12GiB", "RTX 3060"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("rtx pro 6000", "RTX PRO 6000 Blackwell"),
    ],
)
def test_cards_are_found_by_the_names_that_drivers_and_shops_use(name: str, profile: str) -> None:
    assert find_hardware(name) is PROFILES[profile]


@pytest.mark.parametrize("name", ["Voodoo 2", "", "x", "2x", "0x", "RTX"])
def test_an_unknown_name_has_no_profile_and_nothing_near_it(name: str) -> None:
    assert find_hardware(name) is None
    assert nearest_hardware(name, None) is None


def test_a_number_of_cards_stands_before_their_name() -> None:
    two = find_hardware("2x 3090")
    assert two is not None
    assert (two.cards, two.name) == (2, "RTX 3090")


def test_every_series_is_there_with_plausible_figures() -> None:
    names = {card.name for card in CARDS}
    for number in (2060, 2070, 2080, 3050, 3060, 3070, 3080, 3090, 4060, 4070, 4080, 4090):
        assert f"RTX {number}" in names
    for number in (5050, 5060, 5070, 5080, 5090):
        assert f"RTX {number}" in names
    assert len(names | {card.name for card in OTHERS}) == len(CARDS) + len(OTHERS)
    generations = {7.5: 3, 8.0: 4, 8.6: 4, 8.9: 4, 9.0: 5, 12.0: 5}
    for card in CARDS:
        assert card.pcie == generations[card.compute], card
        assert card.lanes in (8, 16), card
        assert 4 <= card.gib <= 256, card


@pytest.mark.parametrize(
    ("name", "memory", "profile", "gib"),
    [
        ("RTX 5080 Super 24GB", None, "RTX 5080", 24),
        ("RTX 4060 Ti 12GB", None, "RTX 4060 Ti 16GB", 12),
        ("RTX 3090 Turbo", None, "RTX 3090", 24),
        ("1080 Ti", None, "RTX 4070", 11),
        ("Radeon RX 7900 XTX", None, "RTX 3090", 24),
        ("RX 9070 XT", None, "RTX 4070 Ti Super", 16),
        ("Apple M4 Max", None, "Quadro RTX 8000", 128),
        ("Voodoo 2", 30 * GIB, "RTX 5090", 30),
        ("Something 24GB", None, "Titan RTX", 24),
    ],
)
def test_a_card_without_a_profile_takes_the_nearest_and_says_so(
    name: str, memory: int | None, profile: str, gib: int
) -> None:
    assert find_hardware(name) is None
    nearest = nearest_hardware(name, memory)
    assert nearest is not None
    found, note = nearest
    assert (found.name, found.memory_bytes) == (profile, gib * GIB)
    assert f"the figures are those of the {profile}" in note


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_memory_is_faster_than_the_link_and_the_link_than_a_disk(profile: Hardware) -> None:
    assert profile.memory_gb_per_s > 5 * profile.link_gb_per_s
    assert profile.link_gb_per_s > profile.disk_gb_per_s
    assert profile.ram_gb_per_s >= profile.link_gb_per_s * 0.9
    assert profile.copy_seconds(10**6, from_disk=True) > profile.copy_seconds(10**6)


def test_servers_have_more_channels_of_ram() -> None:
    for card in CARDS:
        assert (PROFILES[card.name].ram_gb_per_s > 200) == (card.compute in SERVERS)


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
