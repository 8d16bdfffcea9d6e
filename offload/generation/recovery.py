"""A step that ran out of memory is undone, and repeated after expert slots were given back."""

import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offload.engine.engine import Engine
from offload.errors import NO_MEMORY, GenerationError
from offload.transfer.cards import CardsTransfer
from offload.units import parse_bytes

logger = logging.getLogger("offload")

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # ids [1, T], KV cache -> logits, KV cache
Made = TypeVar("Made")


class NotSparedError(Exception):
    """Expert slots could be given back, but the purpose is not worth them."""


def until_it_fits(
    do: Callable[[], Made],
    engine: Engine,
    take_back: Callable[[], None] | None = None,
    spares: Callable[[int], bool] | None = None,
) -> Made:
    """Return what `do` returns; whenever it runs out of memory, give slots back and repeat it.

    `take_back` undoes whatever a failed `do` left behind; it must be safe at any point of failure.
    `spares` decides whether that many bytes may be given back; if not, `NotSparedError` is raised.
    Raises `GenerationError` when no slot is left to give back.
    """
    while True:
        try:
            return do()
        except torch.OutOfMemoryError as error:
            shortage, gpu = asked_bytes(error), asked_gpu(error)
        # Slots are given back outside the handler, where the error no longer keeps the frames of
        # the failed step, and with them its tensors, alive.
        if isinstance(engine.transfer, CardsTransfer):
            shortage = engine.transfer.shortage_of_all(shortage, gpu)
        if spares is not None and not spares(shortage):
            raise NotSparedError
        engine.give_back(shortage)
        if take_back is not None:
            take_back()


def read_until_it_fits(
    step: Step, engine: Engine, ids: Tensor, cache: Any, before: Tensor | None
) -> tuple[Tensor, Any]:
    """Return `step(ids, cache)`; whenever it runs out of memory, give slots back and repeat it.

    `before` [1, L] are the ids that `cache` holds. A cache that cannot be restored is rebuilt by
    reading them again together with `ids`, so the last bits of the result may differ. Raises
    `GenerationError` when no slot is left to give back.
    """
    layers = [] if cache is None else cache.layers
    kinds = {type(layer) for layer in layers}
    restorable = cache is not None and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    tokens = cache.get_seq_length() if restorable else 0
    windows = [layer for layer in layers if restorable and type(layer) is DynamicSlidingWindowLayer]
    for layer in windows:
        layer.record_past = True  # a layer keeps the tokens that leave its window

    def take_back() -> None:
        nonlocal ids, cache
        if restorable:
            _cut_back(cache, tokens)
        elif cache is not None:
            if before is None:
                raise GenerationError(f"out of memory in the middle of a text: {NO_MEMORY}")
            logger.warning("%d tokens are read again", before.shape[-1])
            ids, cache = torch.cat((before, ids), dim=-1), None

    logits, cache = until_it_fits(lambda: step(ids, cache), engine, take_back)
    for layer in windows:
        layer.crop(0)  # drops the tokens that left the window
        layer.record_past = False
    return logits, cache


def _cut_back(cache: Any, tokens: int) -> None:
    """Cut `cache` back to its first `tokens`, after a step that failed at any point.

    transformers' `crop` expects all layers, and the keys and values of a layer, to be equally
    long. That does not hold after such a step.
    """
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        held = tokens
        if type(layer) is DynamicSlidingWindowLayer:
            held = min(tokens, layer.sliding_window - 1)
            layer.cumulative_length = tokens
        layer.keys = layer.keys[..., :held, :]
        layer.values = layer.values[..., :held, :]


def asked_bytes(error: BaseException) -> int:
    """Bytes of the failed allocation, read from torch's message; 0 if below a KiB or unknown."""
    match = re.search(r"allocate (\d+\.\d+ [KMGT]iB)", str(error))
    return (parse_bytes(match.group(1)) or 0) if match else 0


def asked_gpu(error: torch.OutOfMemoryError) -> int | None:
    """The GPU that ran out of memory, read from torch's message; None if it does not name one."""
    match = re.search(r"GPU (\d+) has a total capacity", str(error))
    return int(match.group(1)) if match else None
