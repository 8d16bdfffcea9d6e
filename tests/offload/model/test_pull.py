"""`offload pull` fetches a model that runs here, and says so before it does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import cli
from offload.machine.hardware import Hardware
from offload.machine.measure import DiskRate
from offload.model import hub
from offload.plan import target
from tests.hub import COMMIT, StandIn, stand_in
from tests.published import PUBLISHED

ID = "somebody/tiny"


@pytest.fixture
def server(tmp_path: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The hub, which has a tiny model; this machine is not measured."""
    rates = Hardware("this machine", 20.0, 10.0, 10.0, runs_ahead=False)
    monkeypatch.setattr(target, "measure", lambda device: replace(rates))
    monkeypatch.setattr(target, "read_rate", lambda folder, size: DiskRate(3.0, "by a test"))
    with stand_in(tmp_path / "cache", monkeypatch) as server:
        server.folders[ID] = mixtral
        yield server


def test_a_model_is_planned_and_then_fetched(
    server: StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", ID]) == 0
    out, err = capfd.readouterr()
    assert Path(out.strip()) == tmp_path / "cache" / "models--somebody--tiny/snapshots" / COMMIT
    assert (Path(out.strip()) / "model.safetensors").is_file()
    order = ["MiB to fetch; at 8 bits about", f"fetching {ID}", f"Next: offload chat {ID}"]
    assert sorted(order, key=err.index) == order
    server.asked.clear()
    assert cli.main(["pull", ID]) == 0
    assert server.fetched() == set()
    assert "nothing to fetch" in capfd.readouterr().err


def test_a_model_that_does_not_fit_is_not_fetched(
    server: StandIn, tmp_path: Path, mixtral: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(mixtral, folder)
    PUBLISHED["DeepSeek-V3"].config(hidden_size=2**17, intermediate_size=2**18).save_pretrained(
        folder
    )
    server.folders["somebody/huge"] = folder
    assert cli.main(["pull", "somebody/huge"]) == 1
    assert "somebody/huge does not fit on this machine" in capfd.readouterr().err
    assert "model.safetensors" not in server.fetched()
    hub.forget()
    assert cli.main(["pull", "somebody/huge", "--force"]) == 0
    assert "model.safetensors" in server.fetched()


def test_a_model_that_is_a_folder_is_here_already(
    server: StandIn, mixtral: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", str(mixtral)]) == 1
    assert "is on this machine already" in capfd.readouterr().err
