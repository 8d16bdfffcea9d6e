"""Whether decode steps can be planned on this device, and what plans them there."""

import functools
from collections.abc import Sequence

import torch

from offload.cache.cache import ExpertCache
from offload.cache.policies import POLICIES
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.engine.device.engine import DevicePlanned
from offload.engine.device.gather import gather
from offload.engine.device.table import Places, Table
from offload.engine.layer import Layer
from offload.fit import Fit
from offload.lines import reason
from offload.quant.matmul import launching_on
from offload.quant.pack import PackInfo
from offload.transfer.base import Transfer
from offload.transfer.memory import kernels_read_registered

SHAPE = Shape("check", layers=2, experts=8, top_k=2, record_bytes=0, dense_bytes=0, expert_bits=4.0)
SLOTS, TOKENS = 5, 8


@functools.cache
def kernels_decide_rightly(device: torch.device, policy: str) -> str:
    """Why the kernels cannot be used on `device`, or ""."""
    try:
        with launching_on(device):
            if not _decides(device, policy):
                return "its kernels do not decide as the CPU does on this machine"
            if not _fetches(device):
                return "its kernels copy wrong bytes on this machine"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"its kernels do not run here: {reason(error)}"
    return ""


def _decides(device: torch.device, policy: str) -> bool:
    cache = ExpertCache(SLOTS, SHAPE.layers, POLICIES[policy])
    table = Table(Places(SHAPE.layers, SHAPE.experts, SHAPE.top_k, SLOTS, policy), device)
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
    records = torch.arange(3 * 4096, dtype=torch.int32).view(3, -1).remainder(251).to(torch.uint8)
    records = records.pin_memory() if device.type == "cuda" else records
    addresses = torch.tensor([record.data_ptr() for record in records], device=device)
    slots = torch.zeros(2, 4352, dtype=torch.uint8, device=device)
    experts = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    loads = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    gather(experts, loads, addresses, slots, 4096)
    copied = slots.cpu()[:, :4096]
    return bool((copied == torch.stack((records[1], records[2])).cpu()).all())


DEVICES = ("cuda",)  # on a CPU the kernels are interpreted: for tests


def make(
    info: PackInfo, layers: Sequence[Layer], transfer: Transfer, fit: Fit, k: int
) -> DevicePlanned | str:
    """What plans on the device, or why the host has to plan.

    A token has `k` experts (0: not known). `layers` is filled later.
    """
    device = transfer.device
    if device.type not in DEVICES:
        return "it needs a CUDA GPU"
    if not k:
        return "the model's config does not say how many experts a token has"
    if fit.slots < 2 * k:
        return f"it needs {2 * k} expert slots and there are {fit.slots}"
    if device.type == "cuda" and not kernels_read_registered(device):
        return "this driver shows pinned memory to kernels at other addresses"
    if refused := kernels_decide_rightly(device, fit.options.policy):
        return refused
    addresses = transfer.addresses()
    if addresses is None:
        return "not every expert is in pinned memory: raise --ram or the limit of locked memory"
    experts = max(layer.num_experts for layer in info.layers)
    places = Places(len(info.layers), experts, k, fit.slots, fit.options.policy)
    return DevicePlanned(
        layers, transfer, looks_ahead=fit.looks_ahead, places=places, addresses=addresses
    )
