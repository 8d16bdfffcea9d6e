"""Copies from the mapped pack into slots in host memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.errors import TransferError
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.quant.errors import PackError
from offload.quant.pack import Pack, PackLayer
from offload.transfer.host import NOWHERE, HostTicket, HostTransfer
from tests.interrupt import interrupt_before
from tests.tiny import EXPERTS, save_tiny


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    save_tiny("mixtral", tmp_path / "checkpoint")
    opened = Pack(find_or_make_pack(str(tmp_path / "checkpoint"), LoadOptions(pack_dir=tmp_path)))
    yield opened
    opened.close()


class Gated:
    """Copies wait for `gate`; `order` lists their experts as they are copied."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.order: list[int] = []


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Gated:
    """Every copy in this test waits for the gate."""
    copies, copy = Gated(), HostTransfer._copy

    def gated_copy(self: HostTransfer, ticket: HostTicket) -> None:
        copies.gate.wait()
        copies.order.append(ticket.expert)
        copy(self, ticket)

    monkeypatch.setattr(HostTransfer, "_copy", gated_copy)
    return copies


def test_slot_holds_the_record_after_wait(pack: Pack) -> None:
    transfer = HostTransfer(pack, 3)
    for slot, (layer, expert) in enumerate([(0, 1), (2, 7), (1, 0)]):
        transfer.wait(transfer.start(layer, expert, slot, urgent=True))
        size = pack.info.layout_of(layer).record_bytes
        assert torch.equal(transfer.slot(slot)[:size], pack.record(layer, expert))
    assert transfer.busy_seconds > 0
    transfer.close()


def test_urgent_copies_overtake_others(pack: Pack, gated: Gated) -> None:
    transfer = HostTransfer(pack, 4)
    tickets = [transfer.start(0, expert, expert, urgent=False) for expert in (0, 1, 2)]
    while len(transfer.waiting.guesses) > 2:  # the thread has taken the first
        time.sleep(0.001)
    urgent = transfer.start(0, 3, 3, urgent=True)
    gated.gate.set()
    for ticket in (urgent, *tickets):
        transfer.wait(ticket)
    assert gated.order == [0, 3, 1, 2]
    transfer.close()


def test_waiting_for_a_guess_makes_it_urgent(pack: Pack, gated: Gated) -> None:
    transfer = HostTransfer(pack, 4)
    tickets = [transfer.start(0, expert, expert, urgent=False) for expert in range(4)]
    while len(transfer.waiting.guesses) > 3:  # the thread has taken the first
        time.sleep(0.001)
    threading.Timer(0.2, gated.gate.set).start()
    transfer.wait(tickets[3])
    for ticket in tickets:
        transfer.wait(ticket)
    assert gated.order == [0, 3, 1, 2]
    transfer.close()


def test_damaged_record_is_reported_to_whoever_waits(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    path = find_or_make_pack(str(tmp_path / "checkpoint"), LoadOptions(pack_dir=tmp_path))
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


def test_ctrl_c_anywhere_in_a_wait_leaves_the_transfer_working(pack: Pack, gated: Gated) -> None:
    """Before every instruction of a wait that really waits; a lock left taken would hang."""
    at, interrupted = 0, True
    while interrupted:
        transfer = HostTransfer(pack, 2)
        gated.gate.clear()
        ticket = transfer.start(0, 0, 0, urgent=False)
        threading.Timer(0.002, gated.gate.set).start()
        interrupted = interrupt_before(lambda t=transfer, c=ticket: t.wait(c), at)  # type: ignore[misc]

        def go_on(transfer: HostTransfer = transfer) -> None:
            transfer.drain()  # as the engine does
            transfer.wait(transfer.start(0, 1, 1, urgent=True))
            transfer.close()

        after = threading.Thread(target=go_on, daemon=True)
        after.start()
        after.join(10)
        assert not after.is_alive(), f"hangs after Ctrl-C at instruction {at}"
        at += 1
    assert at > 20


def test_a_waiter_is_told_that_the_copy_thread_ended(pack: Pack) -> None:
    transfer = HostTransfer(pack, 2)
    transfer.close()
    with pytest.raises(TransferError, match="the thread that copies experts has ended: ask again"):
        transfer.wait(transfer.start(0, 0, 0, urgent=True))


class Preempted(deque[HostTicket]):
    """Another thread runs `meanwhile` just before a ticket is taken, once."""

    meanwhile: Callable[[], object] | None = None

    def popleft(self) -> HostTicket:
        if len(self) and self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            call()
        return super().popleft()


def test_a_drain_waits_for_a_copy_that_is_just_giving_way(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise that copy would go on into a slot that holds another record by then."""
    transfer = HostTransfer(pack, 2)
    urgent = Preempted()
    transfer.waiting.urgent = urgent
    marker = HostTicket(0, 0, NOWHERE, True)

    def drain() -> None:  # what `drain` does on its side
        urgent.clear()
        urgent.append(marker)

    give_way = HostTransfer._give_way
    done_early = []

    def watched(self: HostTransfer) -> None:
        urgent.append(HostTicket(0, 1, 1, True))
        urgent.meanwhile = drain
        give_way(self)
        done_early.append(marker.done)

    monkeypatch.setattr(HostTransfer, "_give_way", watched)
    transfer.wait(transfer.start(0, 0, 0, urgent=False))
    monkeypatch.undo()
    transfer.drain()
    assert done_early == [False]
    transfer.close()
