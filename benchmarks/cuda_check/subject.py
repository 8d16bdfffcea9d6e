"""One synthetic model: loaded once, the engine behind its experts changed from figure to figure.

Knows: how an engine is put behind a loaded model. Does not know: what is measured.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

import offload
from benchmarks.cuda_check.attempt import NotBuiltError
from benchmarks.cuda_check.naive import NaiveTransfer
from benchmarks.cuda_check.routing import Routes, drive
from benchmarks.cuda_check.setting import Setting
from cache.trace import Trace
from offload.cuda_transfer import CudaTransfer
from offload.handle import Offload, offload_of
from offload.loading import _connect as connect
from offload.loading import routers
from offload.transfer import HostTransfer, Transfer

HOST, DEVICE = "host", "device"  # engines: the plan made in Python, or in kernels


@dataclass(frozen=True)
class Run:
    """How the experts are served."""

    engine: str
    resident: float  # share of all experts
    lookahead: bool = False

    @property
    def name(self) -> str:
        ahead = ", look-ahead" if self.lookahead else ""
        return f"{self.engine}-planned{ahead}, {self.resident:.0%} resident"


def has_engines() -> bool:
    """Whether a model can be loaded with another engine than the host-planned one."""
    return "engine" in inspect.signature(offload.load).parameters


class Subject:
    """A loaded model whose routers follow a trace."""

    def __init__(self, path: Path, setting: Setting, trace: Trace, context: int) -> None:
        self.setting = setting
        self.top_k = trace.header.top_k
        self.model: PreTrainedModel
        self.model, _ = offload.load(
            path,
            device=setting.device,
            expert_slots=1,
            context=context,
            warm_start=False,
            lookahead=False,
        )
        handle = offload_of(self.model)
        self.pack = handle.pack
        self._options = handle.options
        transfer = handle.engine.transfer
        self._tier = transfer.tier if isinstance(transfer, CudaTransfer) else None
        if self._tier is not None:
            self._tier.join()  # pinned once for all engines that follow
        self.routes = Routes(trace, setting.device)
        drive(routers(self.model, self.pack.info), self.routes)

    @contextmanager
    def serving(self, run: Run) -> Iterator[Offload]:
        """The model with its experts served like `run`. Raises `NotBuiltError`."""
        if run.engine != HOST and not has_engines():
            raise NotBuiltError("there is no engine to choose but the host-planned one")
        slots = max(1, round(self.pack.info.total_experts * run.resident))
        with self._connected(run, slots, self._transfer) as handle:
            yield handle

    @contextmanager
    def serving_naively(self, *, pinned: bool) -> Iterator[Offload]:
        """The model with every chosen expert copied before it is computed, and none kept."""

        def transfer(slots: int) -> Transfer:
            device = self.setting.device
            pins = pinned and device.type == "cuda"
            return NaiveTransfer(self.pack, slots, device, pinned=pins)

        with self._connected(Run(HOST, 0.0), self.top_k, transfer) as handle:
            yield handle

    def _transfer(self, slots: int) -> Transfer:
        if self._tier is None:
            return HostTransfer(self.pack, slots)
        return CudaTransfer(self.pack, slots, self.setting.device, None, tier=self._tier)

    @contextmanager
    def _connected(
        self, run: Run, slots: int, transfer: Callable[[int], Transfer]
    ) -> Iterator[Offload]:
        offload_of(self.model).engine.close()
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()
        residency = replace(self._options.residency, lookahead=run.lookahead)
        options = replace(self._options, slots=slots, residency=residency)
        connect(self.model, self.pack, options, transfer(slots))
        try:
            yield offload_of(self.model)
        finally:
            offload_of(self.model).engine.close()

    def close(self) -> None:
        """Free everything."""
        offload_of(self.model).close()
        if self._tier is not None:
            self._tier.leave()
