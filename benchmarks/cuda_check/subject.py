"""One synthetic model: loaded once, the engine behind its experts changed from figure to figure.

Knows: how an engine is put behind a loaded model. Does not know: what is measured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cuda_check.naive import NaiveTransfer
from benchmarks.cuda_check.routing import Routes, drive
from benchmarks.cuda_check.seam import (
    HOST,
    connect,
    disconnect,
    host_tier,
    load_on_host,
    make_transfer,
    rows,
)
from benchmarks.cuda_check.setting import Setting
from offload.budget.budget import Memory
from offload.budget.resolve import Place, Resolver
from offload.cache.trace.trace import Trace
from offload.engine.handle import Offload, offload_of
from offload.fit import Fit
from offload.loading import routers
from offload.options import LoadOptions
from offload.transfer.base import Transfer


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


class Subject:
    """A loaded model whose routers follow a trace."""

    def __init__(self, path: Path, setting: Setting, trace: Trace, context: int) -> None:
        self.setting = setting
        self.top_k = trace.header.top_k
        self._context = context
        self._memory = Memory.of(setting.device, None, None)  # before anything takes of it
        self.model = load_on_host(path, setting.device, context)
        handle = offload_of(self.model)
        self.pack = handle.pack
        self._tier = host_tier(handle.engine.transfer)  # pinned once for all that follow
        self.routes = Routes(trace, setting.device)
        drive(routers(self.model, self.pack.info), self.routes)

    @property
    def host_memory(self) -> str:
        """How the records are held there, in the tier's own words."""
        return "" if self._tier is None else self._tier.description

    @contextmanager
    def serving(self, run: Run) -> Iterator[Offload]:
        """The model with its experts served like `run`. Raises `NotBuiltError`, `BudgetError`."""
        slots = max(1, round(self.pack.info.total_experts * run.resident))
        fit = self._fit(slots, run.lookahead)
        with self._connected(
            fit, lambda: make_transfer(self.pack, fit, self._tier), run.engine
        ) as handle:
            yield handle

    @contextmanager
    def serving_naively(self, *, pinned: bool) -> Iterator[Offload]:
        """The model with every chosen expert copied before it is computed, and none kept."""
        fit = self._fit(self.top_k, lookahead=False)
        pins = pinned and not self.setting.rehearse
        with self._connected(
            fit,
            lambda: NaiveTransfer(self.pack, rows(fit), fit.device, pinned=pins),
            HOST,
        ) as handle:
            yield handle

    def _fit(self, slots: int, lookahead: bool) -> Fit:
        asked = LoadOptions(
            expert_slots=slots, lookahead=lookahead, warm_start=False, context=self._context
        )
        place = Place(self.setting.device, self._memory)
        return Resolver(asked, place).fit(self.pack.info, self.model.config)

    @contextmanager
    def _connected(
        self, fit: Fit, transfer: Callable[[], Transfer], engine: str
    ) -> Iterator[Offload]:
        self._disconnect()
        try:
            yield connect(self.model, self.pack, fit, transfer(), engine)
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        disconnect(offload_of(self.model))
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free everything."""
        offload_of(self.model).close()
        if self._tier is not None:
            self._tier.leave()
