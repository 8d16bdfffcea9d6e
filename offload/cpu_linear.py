"""Which of torch's two CPU libraries multiplies one token's bfloat16 vectors.

Knows: that oneDNN's overhead a call can exceed the product of a small layer, and how to time both.
Does not know: models' architectures.

A decode step calls a linear layer hundreds of times with one row. torch's own kernel is then often
quicker than oneDNN (measured in docs/log.md), on other processors many times slower: so both are
timed once, and a hook chooses for each call of the model by its number of tokens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

ROWS, COLUMNS, CALLS = 1024, 1024, 50


@functools.cache
def native_is_quicker() -> bool:
    """Whether torch's own kernel multiplies one row quicker than oneDNN on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    row = torch.zeros(1, COLUMNS, dtype=torch.bfloat16)
    seconds = {True: float("inf"), False: float("inf")}
    for _ in range(3):  # the best of each: a machine that does other things only adds
        for onednn in seconds:
            with _onednn(onednn):
                linear(row, weight)
                begin = time.perf_counter()
                for _ in range(CALLS):
                    linear(row, weight)
                seconds[onednn] = min(seconds[onednn], time.perf_counter() - begin)
    return seconds[False] < seconds[True]


@contextmanager
def _onednn(enabled: bool) -> Iterator[None]:
    before = torch.backends.mkldnn.set_flags(enabled)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before[0])


class OneTokenLinear:
    """Switches oneDNN off while a model works on a single token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._before: bool | None = None
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.numel() == 1:
            self._before = torch.backends.mkldnn.set_flags(False)[0]

    def _leave(self, *_: Any) -> None:
        if self._before is not None:
            torch.backends.mkldnn.set_flags(self._before)
            self._before = None
