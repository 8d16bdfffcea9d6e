"""Going on after the device's memory ran out in the middle of a step.

Knows: what to take back, whom to ask for memory, how to try again. Does not know: how many slots
that costs (`offload.engine`), what a step does; of a step planned on the device
(`offload.device.tokens`) also not what it leaves behind.
"""

from __future__ import annotations

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
from offload.units import UNITS


def can_be_restored(cache: Any) -> bool:
    """Whether `restore` knows every layer of `cache`."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def keep_past(cache: Any) -> None:
    """Let layers with a window keep what a step pushes out of it until `settle`."""
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layer.record_past = True


def settle(cache: Any) -> None:
    """The step is over: what was pushed out of a window goes, and cannot be had back."""
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layer.crop(0)
            layer.record_past = False


def restore(cache: Any, tokens: int) -> None:
    """Take back what a step that broke off anywhere added to the first `tokens`.

    Not transformers' `crop`, which expects all layers, and keys and values, to be equally long.
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


logger = logging.getLogger("offload")

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # ids [1, T], KV cache -> logits, KV cache
Made = TypeVar("Made")


class NotSparedError(Exception):
    """There is memory, but what it is wanted for is not worth it."""


def until_it_fits(
    do: Callable[[], Made],
    engine: Engine,
    take_back: Callable[[], None] | None = None,
    spares: Callable[[int], bool] | None = None,
) -> Made:
    """What `do` gives; as long as memory runs out, slots are given back, and after `take_back` it
    is done again.

    `take_back`: of what `do` left when it broke off anywhere. `spares`: whether so many bytes may
    be given back; else `NotSparedError` is raised. Raises `GenerationError` when there is nothing
    to give back.
    """
    while True:
        try:
            return do()
        except torch.OutOfMemoryError as error:
            shortage, gpu = asked_bytes(error), asked_gpu(error)
        # Not in the handler: the error holds the frames, and those the tensors of the step.
        if isinstance(engine.transfer, CardsTransfer):
            shortage = engine.transfer.shortage_of_all(shortage, gpu)
        if spares is not None and not spares(shortage):
            raise NotSparedError
        engine.give_back(shortage)
        if take_back is not None:
            take_back()


def run(
    step: Step, engine: Engine, ids: Tensor, cache: Any, before: Tensor | None
) -> tuple[Tensor, Any]:
    """`step(ids, cache)`; as long as memory runs out, slots are given back and it is done again.

    `before` [1, L]: what `cache` holds, for a cache of which nothing can be taken back: then all is
    read again (in one go, so the last bits may differ). Raises `GenerationError` when there is
    nothing to give back.
    """
    restorable = cache is not None and can_be_restored(cache)
    tokens = cache.get_seq_length() if restorable else 0
    if restorable:
        keep_past(cache)

    def take_back() -> None:
        nonlocal ids, cache
        if restorable:
            restore(cache, tokens)
        elif cache is not None:
            if before is None:
                raise GenerationError(f"out of memory in the middle of a text: {NO_MEMORY}")
            logger.warning("%d tokens are read again", before.shape[-1])
            ids, cache = torch.cat((before, ids), dim=-1), None

    logits, cache = until_it_fits(lambda: step(ids, cache), engine, take_back)
    if restorable:
        settle(cache)
    return logits, cache


def asked_bytes(error: BaseException) -> int:
    """What could not be had, as torch says it; 0 when it does not."""
    match = re.search(r"allocate (\d+(?:\.\d+)?) (\w+)", str(error))
    unit = UNITS.get(match.group(2).upper()) if match else None
    return int(float(match.group(1)) * unit) if match and unit else 0


def asked_gpu(error: torch.OutOfMemoryError) -> int | None:
    """Whose memory ran out, as torch says it; None when it does not."""
    match = re.search(r"GPU (\d+) has a total capacity", str(error))
    return int(match.group(1)) if match else None
