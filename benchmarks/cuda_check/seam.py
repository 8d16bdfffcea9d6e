"""Where this check puts an engine behind a model that is loaded already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.cuda_check.attempt import NotBuiltError
from offload import loading
from offload.engine.handle import Offload, offload_of
from offload.fit import Fit
from offload.quant.errors import OffloadError
from offload.quant.pack import Pack
from offload.transfer.base import Transfer
from offload.transfer.cuda import CudaTransfer
from offload.transfer.host import HostTransfer
from offload.transfer.host_tier import HostTier

HOST, DEVICE = "host", "device"  # engines: the plan made in Python, or in kernels


def load_on_host(path: Path, device: torch.device, context: int) -> PreTrainedModel:
    """The model in the pack `path` with one slot, planned on the host."""
    model, _ = loading.load(
        path,
        device=device,
        expert_slots=1,
        context=context,
        warm_start=False,
        lookahead=False,
        engine=HOST,
    )
    return model


def connect(
    model: PreTrainedModel, pack: Pack, fit: Fit, transfer: Transfer, engine: str
) -> Offload:
    """Put `engine` behind the model's experts. Raises `NotBuiltError` where it is not to be had."""
    try:
        loading._connect(
            model, pack, replace(fit, options=replace(fit.options, engine=engine)), transfer
        )
    except OffloadError as error:
        raise NotBuiltError(str(error)) from None
    handle = offload_of(model)
    if engine == DEVICE and handle.engine.device is None:
        raise NotBuiltError("the host plans instead: a warning said why")
    return handle


@contextmanager
def kernels_anywhere(rehearse: bool) -> Iterator[None]:
    """Inside, steps are also planned by kernels that are interpreted, which is for rehearsals."""
    try:
        from offload.engine.device import make as module
    except ImportError:
        yield
        return
    making: Any = module
    before = making.DEVICES
    making.DEVICES = ("cpu", "cuda") if rehearse else before
    try:
        yield
    finally:
        making.DEVICES = before


def rows(fit: Fit) -> int:
    """Rows of slots: the cache's, and those that prompts are streamed through."""
    return fit.slots + fit.staging


def host_tier(transfer: Transfer) -> HostTier | None:
    """Where records are in host memory, kept for the transfers that follow; None: on no GPU."""
    if not isinstance(transfer, CudaTransfer):
        return None
    transfer.tier.join()
    return transfer.tier


def make_transfer(pack: Pack, fit: Fit, tier: HostTier | None) -> Transfer:
    """Slots on the device, filled from `tier`."""
    if fit.device.type == "cpu":
        return HostTransfer(pack, fit.slots)
    return CudaTransfer(pack, rows(fit), fit.device, fit.ram, tier=tier)


def is_captured(handle: Offload) -> bool:
    """Whether decode steps are replayed from a graph."""
    loop = getattr(getattr(handle, "decoding", None), "loop", None)
    return bool(getattr(getattr(loop, "replay", None), "captured", False))


def queued_ahead(handle: Offload) -> int:
    """Tokens whose steps the device was given, and which nobody has asked for yet."""
    answer = getattr(getattr(handle, "decoding", None), "_answer", None)
    under_way: Any = answer() if answer is not None else None
    return 0 if under_way is None else under_way._queued - under_way._given


def disconnect(handle: Offload) -> None:
    """Free what an engine has on the device, its graphs included."""
    handle.engine.close()
    if hasattr(handle, "decoding"):
        handle.decoding = None
