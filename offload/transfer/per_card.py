"""Cache, transfer and compute as a plan says: one of each, or one for each of several cards.

Knows: which composite stands for which parts. Does not know: what is put where
(`offload.placement`), engines, which of them plans: an engine that plans on a device wants one
card, `Options.cards` empty.
"""

from __future__ import annotations

import contextlib

import torch

from offload.cache.interface import Cache
from offload.cache.sharded import ShardedCache
from offload.engine.compute import Compute, Grouped, OneByOne
from offload.engine.handle import Options
from offload.quant.pack import Pack, PackInfo
from offload.transfer.cards import CardsCompute, CardsTransfer
from offload.transfer.cuda import CudaTransfer
from offload.transfer.host import HostTransfer, Transfer
from offload.transfer.host_tier import HostTier


def cache_of(info: PackInfo, options: Options) -> Cache:
    """Slots that are all empty."""
    make = options.residency.cache
    if len(options.caching) > 1:
        return ShardedCache([make(share.slots, share.moe_layers) for _, share in options.caching])
    return make(options.slots, len(info.layers))


def compute_of(info: PackInfo, transfer: Transfer) -> Compute:
    """What multiplies, from the slots of `transfer`."""
    if isinstance(transfer, CardsTransfer):
        return CardsCompute([compute_of(info, card) for card in transfer.transfers])
    return (OneByOne if transfer.device.type == "cpu" else Grouped)(info, transfer)


def transfer_of(pack: Pack, options: Options, ram: int | None) -> Transfer:
    """Slots and rows past them on every card; all cards are filled from one host tier of `ram`
    bytes (None: a share of what is free)."""
    staging = options.staging
    if not options.cards:
        return _transfer_to(options.device, pack, options.slots, staging, ram, None)
    with contextlib.ExitStack() as undo:
        transfers: list[Transfer] = []
        for card, share in options.caching:
            tier = next((made.tier for made in transfers if isinstance(made, CudaTransfer)), None)
            transfers.append(_transfer_to(card.device, pack, share.slots, staging, ram, tier))
            undo.callback(transfers[-1].close)
        undo.pop_all()
    if len(transfers) == 1:
        return transfers[0]
    return CardsTransfer(transfers, [share.slots for _, share in options.caching])


def _transfer_to(
    device: torch.device,
    pack: Pack,
    slots: int,
    staging: int,
    ram: int | None,
    tier: HostTier | None,
) -> Transfer:
    if device.type == "cpu":
        return HostTransfer(pack, slots)
    return CudaTransfer(pack, slots + staging, device, ram, tier=tier)
