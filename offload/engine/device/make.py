"""Whether a model's decode steps can be planned on its device, and the engine that does.

Knows: what the kernels need of a machine and of the options. Does not know: models.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.cache.cache import ExpertCache
from offload.cache.guesses import Lookahead
from offload.engine.compute import Compute
from offload.engine.device.check import kernels_decide_rightly
from offload.engine.device.compute import SlotDecode
from offload.engine.device.engine import DeviceEngine
from offload.engine.device.places import ALLOCATIONS, POLICIES, Places
from offload.quant.pack import PackInfo
from offload.residency import Residency
from offload.transfer.host import Transfer
from offload.transfer.pinning import kernels_read_registered

DEVICES = ("cuda",)  # on a CPU the kernels are interpreted: for tests


@dataclass(frozen=True)
class Wanted:
    """What an engine is to do."""

    residency: Residency
    lookahead: Lookahead
    slots: int
    k: int  # experts a token; 0: not known
    staging: int  # rows past the slots, for prompts


def why_not(wanted: Wanted, transfer: Transfer) -> str:
    """Why the host has to plan; "" when it need not."""
    residency = wanted.residency
    if transfer.device.type not in DEVICES:
        return "it needs a CUDA GPU"
    if residency.policy not in POLICIES:
        return f"its kernels know the policies {', '.join(POLICIES)}, not {residency.policy}"
    if residency.allocation not in ALLOCATIONS:
        return (
            f"its kernels know the allocations {', '.join(ALLOCATIONS)}, not {residency.allocation}"
        )
    if wanted.lookahead.layers > 1 or (
        wanted.lookahead.layers and wanted.lookahead.predictor != "router"
    ):
        return "it looks ahead one layer, by that layer's router: choose --predictor router"
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
    info: PackInfo, cache: ExpertCache, transfer: Transfer, compute: Compute, wanted: Wanted
) -> DeviceEngine:
    """The engine, where `why_not` says nothing. `compute` is what prompts go through."""
    addresses = transfer.addresses()
    assert addresses is not None
    experts = max(layer.num_experts for layer in info.layers)
    residency = wanted.residency
    places = Places(
        len(info.layers), experts, wanted.k, wanted.slots, residency.policy, residency.allocation
    )
    return DeviceEngine(
        info,
        cache,
        transfer,
        compute,
        wanted.lookahead,
        wanted.staging,
        places=places,
        addresses=addresses,
        decode=SlotDecode(info),
    )
