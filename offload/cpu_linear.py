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
from typing import Any

import torch
from torch.nn.functional import linear

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


def _onednn(enabled: bool) -> Any:
    return torch.backends.mkldnn.flags(enabled=enabled)
