"""Where an engine is put behind a loaded model; what this version of the program has for it.

Knows: the loader's own functions, and which of them came later than this check. Does not know: what
is measured.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.cuda_check.attempt import NotBuiltError
from offload import loading
from offload.cuda_transfer import CudaTransfer
from offload.handle import Offload, Options, offload_of
from offload.transfer import HostTransfer, Transfer
from quant.pack import Pack

HOST, DEVICE = "host", "device"  # engines: the plan made in Python, or in kernels


def connect(
    model: PreTrainedModel, pack: Pack, options: Options, transfer: Transfer, engine: str
) -> Offload:
    """Put `engine` behind the model's experts. Raises `NotBuiltError` where it is not to be had."""
    way: Any = loading._connect
    if "engine" in inspect.signature(loading.load).parameters:
        way(model, pack, options, transfer, engine)
    elif engine == HOST:
        way(model, pack, options, transfer)
    else:
        raise NotBuiltError("there is no engine to choose but the host-planned one")
    handle = offload_of(model)
    if engine == DEVICE and type(handle.engine).__name__ != "DeviceEngine":
        raise NotBuiltError("the host plans instead: a warning said why")
    return handle


def rows(options: Options) -> int:
    """Rows of slots on the device: the cache's, and those that prompts are streamed through."""
    staging: int = getattr(options, "staging", 0) if options.device.type == "cuda" else 0
    return options.slots + staging


def host_tier(transfer: Transfer) -> Any:
    """Where records are in host memory, kept for the transfers that follow; None: they pin anew."""
    tier = getattr(transfer, "tier", None)
    if tier is not None:
        tier.join()
    return tier


def make_transfer(pack: Pack, count: int, device: torch.device, tier: Any) -> Transfer:
    """`count` rows of slots on `device`."""
    if device.type == "cpu":
        return HostTransfer(pack, count)
    way: Any = CudaTransfer
    return way(pack, count, device, None, **({} if tier is None else {"tier": tier}))  # type: ignore[no-any-return]


def disconnect(handle: Offload) -> None:
    """Free what an engine has on the device, its graphs included."""
    handle.engine.close()
    if hasattr(handle, "decoding"):
        handle.decoding = None
