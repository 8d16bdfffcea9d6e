"""Copies from the mapped pack into host slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.errors import PackError
from offload.loading import find_or_make_pack
from offload.recipe import Recipe
from offload.transfer import HostTransfer
from quant.pack import Pack, PackLayer
from tests.tiny import EXPERTS, save_tiny


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    save_tiny("mixtral", tmp_path / "checkpoint")
    opened = Pack(find_or_make_pack(str(tmp_path / "checkpoint"), Recipe(), pack_dir=tmp_path))
    yield opened
    opened.close()


def test_slot_holds_the_record_after_wait(pack: Pack) -> None:
    transfer = HostTransfer(pack, 3)
    for slot, (layer, expert) in enumerate([(0, 1), (2, 7), (1, 0)]):
        transfer.wait(transfer.start(layer, expert, slot, urgent=True))
        size = pack.info.layout_of(layer).record_bytes
        assert torch.equal(transfer.slot(slot)[:size], pack.record(layer, expert))
    assert transfer.busy_seconds > 0
    transfer.close()


def test_urgent_copies_overtake_others(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    gate = threading.Event()
    copy = HostTransfer._copy

    def slow(self: HostTransfer, ticket: object) -> None:
        gate.wait()
        order.append(ticket.expert)  # type: ignore[attr-defined]
        copy(self, ticket)  # type: ignore[arg-type]

    monkeypatch.setattr(HostTransfer, "_copy", slow)
    transfer = HostTransfer(pack, 4)
    tickets = [transfer.start(0, expert, expert, urgent=False) for expert in (0, 1, 2)]
    while len(transfer._queues[1]) > 2:  # the thread has taken the first
        time.sleep(0.001)
    urgent = transfer.start(0, 3, 3, urgent=True)
    gate.set()
    for ticket in (urgent, *tickets):
        transfer.wait(ticket)
    assert order == [0, 3, 1, 2]
    transfer.close()


def test_waiting_for_a_look_ahead_copy_makes_it_urgent(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    gate = threading.Event()
    copy = HostTransfer._copy

    def slow(self: HostTransfer, ticket: object) -> None:
        gate.wait()
        order.append(ticket.expert)  # type: ignore[attr-defined]
        copy(self, ticket)  # type: ignore[arg-type]

    monkeypatch.setattr(HostTransfer, "_copy", slow)
    transfer = HostTransfer(pack, 4)
    tickets = [transfer.start(0, expert, expert, urgent=False) for expert in range(4)]
    while len(transfer._queues[1]) > 3:  # the thread has taken the first
        time.sleep(0.001)
    threading.Timer(0.2, gate.set).start()
    transfer.wait(tickets[3])
    for ticket in tickets:
        transfer.wait(ticket)
    assert order == [0, 3, 1, 2]
    transfer.close()


def test_damaged_record_is_reported_to_whoever_waits(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    path = find_or_make_pack(str(tmp_path / "checkpoint"), Recipe(), pack_dir=tmp_path)
    file = path / PackLayer.file_name(1)
    data = bytearray(file.read_bytes())
    data[4096 + 5] ^= 1  # in the first record: data begins on a page
    file.write_bytes(data)
    pack = Pack(path)
    transfer = HostTransfer(pack, 2)
    transfer.wait(transfer.start(0, 0, 0, urgent=True))
    with pytest.raises(PackError, match=r"experts-00001.*expert 0.*delete the folder"):
        transfer.wait(transfer.start(1, 0, 1, urgent=True))
    transfer.wait(transfer.start(1, 1, 1, urgent=True))  # the thread goes on
    transfer.close()
    pack.close()


def test_close_ends_the_thread(pack: Pack) -> None:
    before = threading.active_count()
    transfer = HostTransfer(pack, EXPERTS)
    for expert in range(EXPERTS):
        transfer.start(0, expert, expert, urgent=False)
    transfer.close()
    assert threading.active_count() == before
