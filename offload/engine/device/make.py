"""Whether decode steps can be planned on this device, and what plans them there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.cache.cache import ExpertCache
from offload.cache.policies import LFRU
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.engine.device.engine import DevicePlanned, SlotDecode
from offload.engine.device.gather import gather
from offload.engine.device.places import Places
from offload.engine.device.table import Table
from offload.engine.layer import Layer
from offload.lines import reason
from offload.quant.matmul import launching_on
from offload.quant.pack import PackInfo
from offload.transfer.base import Transfer
from offload.transfer.pinning import kernels_read_registered

SHAPE = Shape("check", layers=2, experts=8, top_k=2, record_bytes=0, dense_bytes=0, expert_bits=4.0)
SLOTS, TOKENS = 5, 8


@functools.cache
def kernels_decide_rightly(device: torch.device) -> str:
    """Why the kernels cannot be used on `device`, or ""."""
    try:
        with launching_on(device):
            if not _decides(device):
                return "its kernels decide otherwise than the host on this machine"
            if not _fetches(device):
                return "its kernels copy wrongly on this machine"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"its kernels do not run here: {reason(error)}"
    return ""


def _decides(device: torch.device) -> bool:
    cache = ExpertCache(SLOTS, SHAPE.layers, LFRU)
    table = Table(Places(SHAPE.layers, SHAPE.experts, SHAPE.top_k, SLOTS, "lfru"), device)
    table.upload(cache.state())
    for event in synthesize(SHAPE, Routing(recall=0.7), TOKENS).events:
        cache.decide(event.layer, event.experts[0])
        table.decide(event.layer, SHAPE.experts, torch.tensor(event.experts[0], device=device))
        for guess in event.guesses:
            cache.look_ahead(guess.layer, guess.experts, most=len(guess.experts))
            index = torch.tensor(guess.experts, device=device)
            table.look_ahead(guess.layer, SHAPE.experts, index)
    return table.download().keys == cache.state().keys


def _fetches(device: torch.device) -> bool:
    pinned = device.type == "cuda"
    records = torch.arange(3 * 4096, dtype=torch.int32).view(3, -1).to(torch.uint8)
    records = records.pin_memory() if pinned else records
    begins = [record.data_ptr() for record in records]
    addresses = torch.tensor(begins, dtype=torch.int64, device=device)
    slots = torch.zeros(2, 4352, dtype=torch.uint8, device=device)
    experts = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    loads = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    gather(experts, loads, addresses, slots, 4096)
    copied = slots.cpu()[:, :4096]
    return bool((copied == torch.stack((records[1], records[2])).cpu()).all())


DEVICES = ("cuda",)  # on a CPU the kernels are interpreted: for tests


@dataclass(frozen=True)
class Wanted:
    """What is asked of the device."""

    policy: str
    lookahead: bool
    slots: int
    k: int  # experts a token; 0: not known


def why_not(wanted: Wanted, transfer: Transfer) -> str:
    """Why the host has to plan; "" when it need not."""
    if transfer.device.type not in DEVICES:
        return "it needs a CUDA GPU"
    if not wanted.k:
        return "the model's config does not say how many experts a token has"
    if wanted.slots < 2 * wanted.k:
        return f"it needs {2 * wanted.k} expert slots and there are {wanted.slots}"
    if transfer.device.type == "cuda" and not kernels_read_registered(transfer.device):
        return "this driver shows pinned memory to kernels at other addresses"
    if refused := kernels_decide_rightly(transfer.device):
        return refused
    if transfer.addresses() is None:
        return "not every expert is in pinned memory: raise --ram or the limit of locked memory"
    return ""


def make(
    info: PackInfo, layers: Sequence[Layer], transfer: Transfer, wanted: Wanted
) -> DevicePlanned:
    """What plans on the device, where `why_not` says nothing."""
    addresses = transfer.addresses()
    assert addresses is not None
    experts = max(layer.num_experts for layer in info.layers)
    places = Places(len(info.layers), experts, wanted.k, wanted.slots, wanted.policy)
    return DevicePlanned(
        info,
        layers,
        transfer,
        looks_ahead=wanted.lookahead,
        places=places,
        addresses=addresses,
        decode=SlotDecode(info),
    )
