"""Each card has a link of its own: a copy to one never waits for a copy to another."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.cache.guesses import Trust
from offload.engine.handle import offload_of
from offload.quant.pack import Pack
from offload.transfer.cards import CardsTransfer
from offload.transfer.host import HostTicket, HostTransfer
from tests.tiny import save_tiny

SLOTS = (2, 3)


@pytest.fixture
def pack(mixtral_pack: Path) -> Any:
    opened = Pack(mixtral_pack)
    yield opened
    opened.close()


@pytest.fixture
def cards(pack: Pack) -> Any:
    transfer = CardsTransfer([HostTransfer(pack, slots) for slots in SLOTS], SLOTS)
    yield transfer
    transfer.close()


def test_a_record_goes_to_the_row_of_the_card_that_its_slot_is_on(
    pack: Pack, cards: CardsTransfer
) -> None:
    slots = [row * 2 + card for card, rows in enumerate(SLOTS) for row in range(rows)]
    tickets = [
        cards.start(0, expert, slot, urgent=bool(expert % 2)) for expert, slot in enumerate(slots)
    ]
    for expert, (slot, ticket) in enumerate(zip(slots, tickets, strict=True)):
        cards.wait(ticket)
        assert ticket.done
        record = pack.record(0, expert)
        assert torch.equal(cards.slot(slot)[: record.numel()], record)
        cards.release([slot])
    assert cards.busy_seconds == sum(transfer.busy_seconds for transfer in cards.transfers) > 0
    cards.drain()


def test_a_copy_to_one_card_is_done_while_the_link_of_another_stands_still(
    pack: Pack, cards: CardsTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    slow = cards.transfers[0]
    copy = HostTransfer._copy

    def stand_still(self: HostTransfer, ticket: HostTicket) -> None:
        if self is slow:
            assert go_on.wait(10)
        copy(self, ticket)

    monkeypatch.setattr(HostTransfer, "_copy", stand_still)
    first = cards.start(0, 0, 0, urgent=True)
    behind = cards.start(0, 2, 2, urgent=False)
    cards.wait(cards.start(1, 1, 1, urgent=False))
    assert not first.done
    assert cards.drop(behind), "it had not begun"
    go_on.set()
    cards.wait(first)


def test_guesses_for_the_next_card_are_under_way_before_this_cards_loads_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this card's last layer waits for its own loads, guesses for the next card's first layer
    are on their way already, over the other link."""
    for name in ("may_load", "may_evict"):  # though a random model's guesses are poor
        monkeypatch.setattr(Trust, name, lambda self, layer: True)
    save_tiny("mixtral", tmp_path / "checkpoint")
    model, _ = offload.load(
        tmp_path / "checkpoint",
        gpus=("cpu", "cpu"),
        expert_slots=9,
        lookahead=True,
        warm_start=False,
        pack_dir=tmp_path / "packs",
    )
    transfer = offload_of(model).engine.transfer
    assert isinstance(transfer, CardsTransfer)
    first_card = range(len(offload_of(model).fit.shares[0].blocks))
    happened: list[tuple[str, int, int]] = []  # what, card, layer
    start, wait = CardsTransfer.start, CardsTransfer.wait

    def note_start(self: CardsTransfer, layer: int, *rest: int, urgent: bool) -> Any:
        ticket = start(self, layer, *rest, urgent=urgent)
        assert ticket.card == (layer not in first_card)
        happened.append(("load" if urgent else "guess", ticket.card, layer))
        return ticket

    def note_wait(self: CardsTransfer, ticket: Any) -> None:
        happened.append(("wait", ticket.card, -1))
        wait(self, ticket)

    monkeypatch.setattr(CardsTransfer, "start", note_start)
    monkeypatch.setattr(CardsTransfer, "wait", note_wait)
    model.generate(torch.arange(5, 15)[None], max_new_tokens=40, do_sample=False)
    offload_of(model).close()
    both = 0
    for at, (what, card, layer) in enumerate(happened):
        if (what, card, layer) == ("load", 0, first_card[-1]):
            after = happened[at + 1 :]
            waited = after.index(("wait", 0, -1))
            both += ("guess", 1, first_card[-1] + 1) in after[:waited]
    assert both > 0


def test_a_shortage_on_one_card_is_given_back_by_all_in_the_ratio_of_their_slots(
    pack: Pack,
) -> None:
    transfers = [HostTransfer(pack, slots) for slots in SLOTS]
    for number, transfer in enumerate(transfers):
        transfer.device = torch.device("cuda", number)
    cards = CardsTransfer(transfers, SLOTS)
    assert cards.shortage_of_all(600, 0) == 1500
    assert cards.shortage_of_all(600, 1) == 1000
    assert cards.shortage_of_all(600, None) == cards.shortage_of_all(600, 7) == 1500
    cards.close()
