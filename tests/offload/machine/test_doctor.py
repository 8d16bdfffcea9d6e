"""`offload doctor` gives every look a verdict, and a remedy for whatever is amiss."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cli
from offload.machine import doctor, graphics, measure
from offload.machine.finding import MISSING, OK, SLOW, Finding
from offload.machine.graphics import PciePort, linux_ports, nvml_ports
from offload.machine.hardware import Hardware
from offload.machine.measure import read_rate

MIB, GIB = 2**20, 2**30


def named(findings: Iterator[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace measurements by fixed rates, because the looks are tested and not this machine."""
    machine = Hardware("x", memory_gb_per_s=20.0, link_gb_per_s=10.0, ram_gb_per_s=10.0)
    for module in (doctor, graphics):
        monkeypatch.setattr(module, "measure", lambda device: machine)
    monkeypatch.setattr(doctor, "read_rate", lambda place: measure.DiskRate(3.0, "by a test"))


def test_this_machine_is_told_line_by_line(rates: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("offload", "Python", "libraries", "instruction sets", "CPU kernels", "RAM copies"):
        assert f" {name} " in out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def test_a_bug_report_is_json(rates: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {finding["verdict"] for finding in findings} <= {OK, SLOW, MISSING}
    for finding in findings:
        assert (finding["remedy"] is None) == (finding["verdict"] == OK), finding
    kernels = next(finding for finding in findings if finding["name"] == "CPU kernels")
    assert kernels["broken_bits"] == []


def test_a_look_that_fails_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("half", "was told")
        raise RuntimeError("the driver\nis gone")

    monkeypatch.setattr(
        doctor, "looks", lambda: {"GPUs": broken, "disk": lambda: iter([Finding("d", "e")])}
    )
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "check failed: the driver is gone" in " ".join(out.split())
    assert "half" in out
    assert "\nok      d" in out
    assert out.endswith("\n1 warning\n")


def test_a_missing_library_is_installed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: None if name in ("hqq", "gguf") else known(name)
    )
    found = {finding.name: finding for finding in doctor.software()}
    assert found["libraries"].verdict == MISSING
    assert found["libraries"].remedy == "pip install hqq"
    assert found["gguf"].remedy == "pip install gguf"


def test_triton_has_a_verdict_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed_version
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert named(doctor.software(), "Triton").verdict == SLOW
    monkeypatch.delenv("TRITON_INTERPRET")
    assert named(doctor.software(), "Triton").verdict == OK
    monkeypatch.setattr(doctor, "installed_version", lambda n: None if n == "triton" else known(n))
    assert named(doctor.software(), "Triton").remedy == "pip install triton"
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    assert not any(finding.name == "Triton" for finding in doctor.software())


@pytest.mark.parametrize(
    "name", ["XDG_CACHE_HOME", "HF_HUB_CACHE", "CUDA_HOME", "TRITON_CACHE_DIR"]
)
def test_a_variable_that_moves_things_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/elsewhere")
    assert f"{name}=/elsewhere" in named(doctor.software(), "environment").value


@pytest.mark.parametrize(("load", "first"), [(3.0, "the CPU is busy"), (0.0, "fill both")])
def test_a_busy_machine_is_named_before_its_memory_is_blamed(
    load: float, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Hardware("x", memory_gb_per_s=3.0, link_gb_per_s=2.0, ram_gb_per_s=2.0)
    monkeypatch.setattr(doctor, "measure", lambda device: slow)
    monkeypatch.setattr(doctor, "programs_a_core", lambda: load)
    assert named(doctor.memory(), "RAM copies").remedy.startswith(first)


def test_kernels_that_are_wrong_here_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_kernel_works", lambda way, bits, *_: bits != 3)
    kernels = named(doctor.processor(), "CPU kernels")
    assert kernels.verdict == MISSING
    assert kernels.value == "do not work for 3 bits"


def test_a_processor_without_vectors_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(
        "model name\t: Old One\nflags\t\t: fpu sse2\n\nprocessor: 1\n"
    )
    monkeypatch.setattr(measure, "CPUINFO", tmp_path / "cpuinfo")
    assert named(doctor.processor(), "processor").value.startswith("Old One, ")
    assert named(doctor.processor(), "instruction sets").verdict == SLOW


def test_slow_memory_and_a_slow_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Hardware("x", memory_gb_per_s=3.0, link_gb_per_s=2.0, ram_gb_per_s=2.0)
    monkeypatch.setattr(doctor, "measure", lambda device: slow)
    monkeypatch.setattr(doctor, "read_rate", lambda place: measure.DiskRate(0.2, "by a test"))
    assert named(doctor.memory(), "RAM copies").verdict == SLOW
    assert "NVMe" in named(doctor.disk(tmp_path / "not yet"), "disk reads").remedy


def test_a_place_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Path) -> measure.DiskRate:
        raise PermissionError(13, "Permission denied", f"{place}/.temporary")

    monkeypatch.setattr(doctor, "read_rate", refuse)
    found = named(doctor.disk(tmp_path), "disk reads")
    assert "OFFLOAD_HOME" in found.remedy
    assert found.value == f"not measured: {tmp_path} cannot be written (Permission denied)"


def test_the_home_folder_is_told_as_people_write_it(
    rates: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named(doctor.disk(tmp_path / "not yet"), "disk space").value.endswith(" free at ~")
    (tmp_path / "packs").mkdir()
    assert named(doctor.disk(tmp_path / "packs"), "disk space").value.endswith(" free at ~/packs")


@pytest.mark.parametrize("limit", [8 * MIB, -1])
def test_the_pin_limit_matters_with_a_gpu_only(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    with_gpu, without = (next(doctor.pin_limit(has_gpu)) for has_gpu in (True, False))
    assert without.verdict == OK
    assert with_gpu.verdict == (OK if limit == -1 else SLOW)


# --- the disk -------------------------------------------------------------------------------------


def test_a_disk_is_read_and_nothing_is_left(tmp_path: Path) -> None:
    rate = read_rate(tmp_path / "not" / "there", 16 * MIB)
    assert rate.gb_per_s > 0.001
    assert "page cache" in rate.how
    assert not any(tmp_path.iterdir())


def test_without_direct_reads_the_page_cache_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert "posix_fadvise" in read_rate(tmp_path, 16 * MIB).how


# --- GPUs -----------------------------------------------------------------------------------------

CARD = PciePort("NVIDIA GeForce RTX 4090", 1, 4, 16, 16)


class MadeUpNvml:
    """NVIDIA's management library as far as `doctor` uses it; a card is what it says of itself."""

    class NVMLError(Exception):
        pass

    def __init__(self, *cards: PciePort, answers: bool = True) -> None:
        self.cards, self.answers, self.open = cards, answers, False

    def nvmlInit(self) -> None:
        if not self.answers:
            raise self.NVMLError("driver not loaded")
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        assert self.open
        return "570.86.15"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> PciePort:
        return self.cards[index]

    def nvmlDeviceGetName(self, card: PciePort) -> str:
        return card.card

    def told(self, number: int) -> int:
        if not number:
            raise self.NVMLError("not supported")
        return number

    def nvmlDeviceGetCurrPcieLinkGeneration(self, card: PciePort) -> int:
        return self.told(card.generation)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, card: PciePort) -> int:
        return self.told(card.most_generation)

    def nvmlDeviceGetCurrPcieLinkWidth(self, card: PciePort) -> int:
        return self.told(card.width)

    def nvmlDeviceGetMaxPcieLinkWidth(self, card: PciePort) -> int:
        return self.told(card.most_width)


def test_a_driver_tells_generation_and_width() -> None:
    cards = (CARD, replace(CARD, width=4), PciePort("Virtual", 0, 0, 0, 0))
    nvml = MadeUpNvml(*cards)
    assert nvml_ports(nvml) == ("570.86.15", list(cards))
    assert not nvml.open
    assert CARD.gb_per_s == pytest.approx(31.5, abs=0.1)


def test_a_library_that_no_longer_has_what_is_asked_fails_loudly() -> None:
    nvml = MadeUpNvml(CARD)
    nvml.nvmlDeviceGetName = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        nvml_ports(nvml)


def test_every_function_that_is_asked_for_is_in_the_library() -> None:
    real = pytest.importorskip("pynvml")
    asked = [name for name in dir(MadeUpNvml) if name.startswith("nvml")]
    assert len(asked) == 10, asked
    assert all(hasattr(real, name) for name in asked)


def test_few_lanes_are_slow_and_unknown_ones_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = MadeUpNvml(CARD, replace(CARD, width=4), PciePort("Virtual", 0, 0, 0, 0))
    monkeypatch.setattr(graphics, "installed_nvml", lambda: nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = [f for f in graphics.graphics(tmp_path) if f.name == "PCIe"]
    assert [finding.verdict for finding in found] == [OK, SLOW, OK]
    assert "x4 of x16" in found[1].value
    assert "not readable" in found[2].value


def plug_in(devices: Path, name: str, vendor: str) -> None:
    """List a display card in `devices` as Linux does."""
    (devices / name).mkdir()
    for file, text in {
        "vendor": vendor,
        "class": "0x030000",
        "current_link_speed": "8.0 GT/s PCIe",
        "max_link_speed": "16.0 GT/s PCIe",
        "current_link_width": "8",
        "max_link_width": "16",
    }.items():
        (devices / name / file).write_text(text + "\n")


def test_linux_tells_generation_and_width_without_a_driver(tmp_path: Path) -> None:
    plug_in(tmp_path, "a", "0x10de")
    plug_in(tmp_path, "b", "0x8086")
    assert linux_ports(tmp_path) == [PciePort("NVIDIA GPU at a", 3, 4, 8, 16)]
    assert linux_ports(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("nvml", "remedy"),
    [(MadeUpNvml(answers=False), "driver"), (None, "pip install nvidia-ml-py")],
)
def test_a_card_without_a_driver_is_told(
    nvml: MadeUpNvml | None, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(tmp_path, "a", "0x10de")
    monkeypatch.setattr(graphics, "installed_nvml", lambda: nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {finding.name: finding for finding in graphics.graphics(tmp_path)}
    assert found["driver"].verdict == found["CUDA"].verdict == found["GPU"].verdict == MISSING
    assert remedy in found["driver"].remedy
    assert found["PCIe"].verdict == SLOW


def test_nothing_is_said_of_drivers_where_there_is_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphics, "installed_nvml", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" not in {finding.name for finding in graphics.graphics(tmp_path)}


@pytest.mark.parametrize("pins", [True, False])
def test_a_card_is_measured(pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is made up: what is told of it is tested, not what torch does."""

    def measured(device: torch.device) -> Hardware:
        if not pins:
            raise RuntimeError("CUDA error: out of memory")
        return Hardware("card", 850.0, 26.0, 50.0)

    about = SimpleNamespace(name="RTX 4090", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(graphics, "installed_nvml", lambda: MadeUpNvml(CARD))
    monkeypatch.setattr(graphics, "measure", measured)
    monkeypatch.setattr(graphics, "pageable_rate", lambda device: 6.5)
    found = {finding.name: finding for finding in graphics.graphics()}
    assert found["driver"].value == "570.86.15"
    assert found["GPU 0"].verdict == SLOW
    assert found["link 0"].verdict == (OK if pins else MISSING)
    if pins:
        assert found["link 0"].value == "26.0 GB/s from pinned memory, 6.5 from other"
        assert found["VRAM 0"].value == "weights read at 850 GB/s"
    else:
        assert "ulimit -l" in found["link 0"].remedy
