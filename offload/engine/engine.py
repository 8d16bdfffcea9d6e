"""A model's experts, served a call at a time; only this module decides who plans a call."""

# T tokens, k experts a token, H hidden

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offload.cache.cache import ExpertCache
from offload.cache.guesses import LookaheadBalance
from offload.cache.sharded import Cache
from offload.engine.compute import cache_of, compute_of
from offload.engine.history import RoutingTrace
from offload.engine.host import HostPlanned
from offload.engine.layer import Call, Layer
from offload.engine.stats import Stats
from offload.errors import NO_MEMORY, GenerationError
from offload.fit import Fit
from offload.quant.errors import OffloadError
from offload.quant.pack import PackInfo
from offload.transfer.base import Transfer
from offload.units import gib

if TYPE_CHECKING:  # it loads Triton
    from offload.engine.device.engine import DevicePlanned

logger = logging.getLogger("offload")

SLACK = 64 << 20  # bytes given back beyond the shortage, or a quarter of the shortage


class Engine:
    """The calls of all MoE layers: the device plans one token's where it can, the host the others.

    The state of the cache is in one place at a time and moves as a whole, so the decisions are
    those that the host would make alone.
    """

    def __init__(self, host: HostPlanned, device: DevicePlanned | None = None) -> None:
        """Without `device` the host plans everything."""
        self.host, self.device = host, device
        self._on_device = False  # whether the device's table is valid, and not the cache
        self.transfer = host.transfer
        self.layers = host.layers
        self._reads_prompt: bool | None = None  # the model's present call; None: not known
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # One call at a time, whichever thread uses the model. Ctrl-C cannot leave the lock taken:
        # Python looks for signals after the call that releases it, not before.
        self._lock = threading.RLock()
        self._broken_off = False  # the previous call did not finish
        self.closed = False

    @property
    def cache(self) -> Cache:
        """Which experts are resident. Waits for the device if the device decides."""
        self.plan_on_host()
        return self.host.cache

    def add_layer(self, module: nn.Module) -> Layer:
        """The next MoE layer of the model."""
        layer = Layer(self.step, len(self.layers), module, self.host.info)
        self.layers.append(layer)
        return layer

    def watch_calls(self, model: nn.Module) -> None:
        """Notice when the model reads a prompt: a call of several positions."""
        self._hooks.append(model.register_forward_pre_hook(self._note_call, with_kwargs=True))

    def _note_call(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        for given in (*args[:1], named.get("input_ids"), named.get("inputs_embeds")):
            if isinstance(given, Tensor):
                self._reads_prompt = given.shape[1] > 1
                return

    def watch_routers(self, model: nn.Module, routers: Sequence[nn.Module | None]) -> None:
        """Look ahead with these routers, one for each layer; None where there is none to ask."""
        owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for layer, router in zip(self.layers, routers, strict=True):
            if router is not None:
                self._hooks.append(layer.watch(model, router, owned))

    def step(
        self, layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The experts' part of one layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        with self._lock:
            self._check_open()
            if hidden.requires_grad:
                raise GenerationError("slots are reused, so gradients cannot be had: use no_grad()")
            if self._broken_off:
                self._start_over()
                self.host.warm_again()
            # Cleared only on success, so an exception or Ctrl-C at any point leaves it set.
            self._broken_off = True
            call = Call(layer, hidden, top_k_index, top_k_weights, self._reads_prompt)
            out = self._planner(call).serve(call)
            self._broken_off = False
            return out

    def _planner(self, call: Call) -> HostPlanned | DevicePlanned:
        """Who plans `call`. The device takes over only between two tokens, and plans one token."""
        if self.device is not None:
            self.device.see(call.hidden.dtype)
            one_token = len(call.hidden) == 1 and not call.reads_prompt
            begins = call.layer.index == 0
            if one_token and (self._on_device or (begins and self.plan_on_device())):
                return self.device
            self.plan_on_host()
        return self.host

    def plan_on_device(self) -> bool:
        """Give the device what the cache knows, between two tokens; False: the host has to plan."""
        if self._on_device or self.device is None:
            return self._on_device
        if not self.device.computes or self.host.must_plan:
            return False
        self.host.settle()
        self.device.take_over(self._only_cache().state())
        self._on_device = True
        return True

    def plan_on_host(self) -> None:
        """Give the cache what the device decided. Waits for the device."""
        if not self._on_device:
            return
        assert self.device is not None
        self.device.come_together()
        self.count(self.device.counts())
        self._only_cache().adopt(self.device.table.download())
        self._on_device = False

    def _only_cache(self) -> ExpertCache:
        cache = self.host.cache
        assert isinstance(cache, ExpertCache), "a device that plans is the only one"
        return cache

    @contextlib.contextmanager
    def loop(self) -> Iterator[bool]:
        """A decode loop runs a step inside; whether the device plans that step."""
        assert self.device is not None
        with self._lock:
            self._check_open()
            self.device.looping = True
            try:
                yield self.plan_on_device()
            finally:
                self.device.looping = False

    def _check_open(self) -> None:
        if self.closed:
            raise GenerationError("the model was closed: load it again")

    def never_happened(self) -> None:
        """The work queued last on the device did not run, because a capture failed."""
        assert self.device is not None
        self.device.forget_queued()
        self._broken_off = False

    def count(self, counts: list[int]) -> None:
        """Add what is new in `counts`, which are `Table.counts` of some moment; nothing is new in
        those of a moment before the counts added last."""
        assert self.device is not None
        layers = self.host.cache.statistics.layers
        before = [layer.loads for layer in layers]
        tokens = self.device.add_new(counts, layers)
        loads = [layer.loads - had for layer, had in zip(layers, before, strict=True)]
        self.host.count_elsewhere(tokens, loads)

    def warm(self, hot: Iterable[tuple[int, int, float]]) -> None:
        """Load what was `hot` in an earlier run: layer, expert, decayed uses; hottest first."""
        with self._lock:
            self.plan_on_host()
            self.host.warm(hot)

    def settle(self) -> None:
        """Return when no copy is under way. Raises what a copy raised."""
        with self._lock:
            if self._broken_off:  # nobody knows which copies were begun
                self._start_over()
            else:
                self.host.settle()

    def spares(self, shortage: int) -> bool:
        """Whether steps can still be planned on the device when `shortage` bytes are given back."""
        assert self.device is not None
        left = fewer_slots(self.host.cache.table.slots, shortage, self.host.info.slot_bytes)
        return left >= self.device.fewest_slots

    @torch.inference_mode(False)  # what takes the old slots' place is written outside of it, too
    def give_back(self, shortage: int) -> None:
        """An allocation of `shortage` bytes failed on the device: have fewer slots from now on.

        What the slots held is forgotten. Raises `GenerationError` when there is but one slot
        (on each card).
        """
        with self._lock:
            self.plan_on_host()
            host, table = self.host, self.host.cache.table
            before = slots = table.slots
            least = host.cache.least_slots
            self._start_over()
            self._broken_off = False
            while True:
                if slots == least:
                    left = "one expert slot left" + " on each card" * (least > 1)
                    raise GenerationError(
                        f"out of GPU memory with {left}: {NO_MEMORY}, or raise --vram"
                    )
                slots = max(least, fewer_slots(slots, shortage, host.info.slot_bytes))
                try:
                    host.resize(slots)
                    if self.device is not None:
                        self.device.resize(slots)
                    break
                except torch.OutOfMemoryError:  # somebody else took the memory meanwhile
                    shortage = 0
        logger.warning(
            "out of GPU memory: %d of %d expert slots (%s) are given back, and it goes on",
            before - slots,
            before,
            gib((before - slots) * host.info.slot_bytes),
        )

    def _start_over(self) -> None:
        """Empty the slots, because their recorded contents can no longer be trusted."""
        before, self._broken_off = self._broken_off, True  # Ctrl-C may come in here, too
        if self.device is not None:
            if self._on_device:
                self.count(self.device.counts())
            self._on_device = False
            self.device.forget_queued()
        self.host.start_over()
        self._broken_off = before

    def record(self, trace: RoutingTrace, noted_layers: int = 0) -> None:
        """Write down every call from now on, beginning with empty slots, so that a replay is exact.

        With `noted_layers` the routers of so many later layers are asked too, whether or not that
        is acted on.
        """
        with self._lock:
            self.stop_recording()
            self._start_over()
            self.host.record(trace, noted_layers)

    def stop_recording(self) -> None:
        """The routing trace is complete."""
        self.host.stop_recording()

    def record_bytes(self, layer: int) -> int:
        """Size of one expert's record."""
        return self.host.info.layout_of(layer).record_bytes

    def stats(self) -> Stats:
        """The figures of everything so far; subtract two to get what happened between them."""
        if self._on_device and self.device is not None and not self.device.counts_come:
            self.count(self.device.counts())
        return self.host.stats()

    def close(self) -> None:
        """Free the slots and end the copies; the model cannot be used afterwards."""
        if self.closed:
            return
        self.plan_on_host()
        self.closed = True
        for hook in self._hooks:
            hook.remove()
        self.host.close()


def fewer_slots(slots: int, shortage: int, slot_bytes: int) -> int:
    """How many of `slots` remain so that `shortage` bytes and some more become free."""
    wanted = -(-(shortage + max(shortage // 4, SLACK)) // slot_bytes) if shortage else 0
    return max(1, slots - max(wanted, -(-slots // 10)))


def make_engine(info: PackInfo, fit: Fit, transfer: Transfer, k: int) -> Engine:
    """The engine of a model each of whose tokens has `k` experts (0: not known).

    `--engine auto` means the device wherever it can plan. A warning says why it cannot, where that
    was asked for or to be expected. Raises `OffloadError` for `--engine device` without a GPU.
    """
    asked = fit.options.engine
    cache, compute = cache_of(info, fit), compute_of(info, transfer)
    layers: list[Layer] = []
    device: DevicePlanned | str | None = None
    if asked == "device" or (asked == "auto" and fit.device.type == "cuda"):
        if not isinstance(cache, ExpertCache) or fit.cards:
            logger.warning("steps are planned on the host: the model is on several cards")
        else:
            try:
                from offload.engine.device.make import make
            except ImportError as error:
                device = f"it needs Triton ({error})"
            else:
                device = make(info, layers, transfer, fit, k)
    if isinstance(device, str):  # the reason why there is none
        if fit.device.type != "cuda":
            raise OffloadError(f"there is no device-planned engine here: {device}: choose host")
        logger.warning("steps are planned on the host, with a wait at every layer: %s", device)
        device = None
    # On the device a guess costs the host nothing, so it is not weighed.
    weighs = device is None and fit.options.lookahead is None
    balance = LookaheadBalance() if weighs else None
    host = HostPlanned(
        info, layers, cache, transfer, compute, balance, fit.looks_ahead, fit.staging
    )
    return Engine(host, device)
