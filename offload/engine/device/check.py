"""Whether the kernels can be trusted on a device: a short run beside the cache on the host.

Knows: one small trace and one small copy. Does not know: models.
"""

from __future__ import annotations

import functools

import torch

from offload.cache.cache import ExpertCache
from offload.cache.policies.lfru import LFRU
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.engine.device.gather import gather
from offload.engine.device.places import Places
from offload.engine.device.table import Table
from offload.errors import reason
from offload.quant.gpu import launching_on

SHAPE = Shape("check", layers=2, experts=8, top_k=2, record_bytes=0, dense_bytes=0, expert_bits=4.0)
SLOTS, TOKENS = 5, 8


@functools.cache
def kernels_decide_rightly(device: torch.device) -> str:
    """Why the kernels cannot be used, or ""."""
    try:
        with launching_on(device):
            if not _plans(device):
                return "its kernels decide otherwise than the host on this machine"
            if not _copies(device):
                return "its kernels copy wrongly on this machine"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"its kernels do not run here: {reason(error)}"
    return ""


def _plans(device: torch.device) -> bool:
    cache = ExpertCache(SLOTS, SHAPE.layers, LFRU)
    table = Table(Places(SHAPE.layers, SHAPE.experts, SHAPE.top_k, SLOTS, "lfru", "shared"), device)
    table.upload(cache.state())
    for event in synthesize(SHAPE, Routing(recall=0.7), TOKENS).events:
        cache.plan(event.layer, event.experts[0])
        table.plan(event.layer, SHAPE.experts, torch.tensor(event.experts[0], device=device))
        for guess in event.guesses:
            cache.look_ahead(guess.layer, guess.experts, most=len(guess.experts))
            index = torch.tensor(guess.experts, device=device)
            table.look_ahead(guess.layer, SHAPE.experts, index)
    return table.download().keys == cache.state().keys


def _copies(device: torch.device) -> bool:
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
