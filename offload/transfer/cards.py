"""One transfer for each card, behind the interface of one; no copy waits for another card's."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from offload.cache.sharded import card_and_row, divided
from offload.fit import Fit
from offload.quant.pack import Pack
from offload.transfer.base import Ticket, Transfer
from offload.transfer.cuda import CudaTransfer
from offload.transfer.host import HostTransfer
from offload.transfer.host_tier import HostTier


class CardTicket(NamedTuple):
    """A copy on its way to one of the cards."""

    card: int
    ticket: Ticket

    @property
    def done(self) -> bool:
        return self.ticket.done


class CardsTransfer:
    """`Transfer`'s interface over several transfers, one for each card."""

    def __init__(self, transfers: Sequence[Transfer], slots: Sequence[int]) -> None:
        """`slots` has the cache's slots on each card; fewer are later divided in their ratio."""
        self.transfers = tuple(transfers)
        self._had = tuple(slots)
        self.device = self.transfers[0].device
        self.overtakes = all(transfer.overtakes for transfer in self.transfers)
        self.streams_in_place = all(transfer.streams_in_place for transfer in self.transfers)
        self.in_place = all(transfer.in_place for transfer in self.transfers)

    @property
    def busy_seconds(self) -> float:
        """Time of all links together: two that copy at once count twice."""
        return sum(transfer.busy_seconds for transfer in self.transfers)

    @property
    def slots(self) -> NoReturn:
        raise AssertionError("each card has its own: ask one of `transfers`")

    def slot(self, index: int) -> Tensor:
        card, row = self._place(index)
        return self.transfers[card].slot(row)

    def addresses(self) -> None:
        """None: an engine that plans on the device has one card."""

    def start(self, layer: int, expert: int, slot: int, *, urgent: bool) -> CardTicket:
        card, row = self._place(slot)
        ticket = self.transfers[card].start(layer, expert, row, urgent=urgent)
        return CardTicket(card, ticket)

    def wait(self, ticket: CardTicket) -> None:
        self.transfers[ticket.card].wait(ticket.ticket)

    def keep(self, layer: int, expert: int, row: int, slot: int) -> CardTicket | None:
        card, at = self._place(row)
        ticket = self.transfers[card].keep(layer, expert, at, self._place(slot)[1])
        return None if ticket is None else CardTicket(card, ticket)

    def drop(self, ticket: CardTicket) -> bool:
        return self.transfers[ticket.card].drop(ticket.ticket)

    def drain(self) -> None:
        """Drain all cards: they may share a host tier, which then holds nothing."""
        for transfer in self.transfers:
            transfer.drain()

    def release(self, slots: Sequence[int]) -> None:
        by_card: dict[int, list[int]] = {}
        for card, row in map(self._place, slots):
            by_card.setdefault(card, []).append(row)
        for card, rows in by_card.items():
            self.transfers[card].release(rows)

    def resize(self, slots: int, staging: int) -> None:
        self.drain()
        for transfer, count in zip(self.transfers, divided(slots, self._had), strict=True):
            transfer.resize(count, staging)

    def shortage_of_all(self, shortage: int, gpu: int | None) -> int:
        """How many bytes all cards have to give back, in the ratio of their slots, so that `gpu`
        gets `shortage` bytes; None: it may be any of the cards."""
        cards = [transfer.device.index for transfer in self.transfers]
        had = self._had[cards.index(gpu)] if gpu is not None and gpu in cards else min(self._had)
        return shortage * sum(self._had) // had

    def close(self) -> None:
        for transfer in self.transfers:
            transfer.close()

    def _place(self, slot: int) -> tuple[int, int]:
        return card_and_row(slot, len(self.transfers))


def transfer_of(pack: Pack, fit: Fit) -> Transfer:
    """Slots and rows past them on every card; all cards are filled from one host tier."""
    if not fit.cards:
        return _transfer_to(fit.device, pack, fit.slots, fit, None)
    with contextlib.ExitStack() as undo:
        transfers: list[Transfer] = []
        for card, share in fit.caching:
            tier = next((made.tier for made in transfers if isinstance(made, CudaTransfer)), None)
            transfers.append(_transfer_to(card.device, pack, share.slots, fit, tier))
            undo.callback(transfers[-1].close)
        undo.pop_all()
    if len(transfers) == 1:
        return transfers[0]
    return CardsTransfer(transfers, [share.slots for _, share in fit.caching])


def _transfer_to(
    device: torch.device, pack: Pack, slots: int, fit: Fit, tier: HostTier | None
) -> Transfer:
    if device.type == "cpu":
        return HostTransfer(pack, slots, in_place=fit.in_place)
    return CudaTransfer(pack, slots + fit.staging, device, fit.ram, tier=tier)
