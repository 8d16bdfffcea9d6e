"""What hangs on a loaded model as `model.offload`.

Knows: the parts a running model is made of, and how it was set up. Does not know: how it came to
be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from offload.cpu_linear import OneTokenLinear
from offload.engine import Engine
from offload.stats import Stats
from quant.pack import Pack


@dataclass(frozen=True)
class Options:
    """How a pack is run, complete: nothing is left to be decided later."""

    device: torch.device
    dtype: torch.dtype
    slots: int
    policy: str
    lookahead: bool | None  # None: while it pays
    context: int


class Offload:
    """A model's experts: `model.offload`."""

    def __init__(
        self, pack: Pack, engine: Engine, options: Options, one_token: OneTokenLinear | None
    ) -> None:
        self.pack = pack
        self.engine = engine
        self.options = options
        self._one_token = one_token

    def stats(self) -> Stats:
        """Hits, misses, bytes, waiting and look-ahead since the model was loaded."""
        return self.engine.stats()

    def close(self) -> None:
        """Free the slots, the mapping and the copy thread. The model cannot be used afterwards."""
        if self._one_token is not None:
            self._one_token.close()
        self.engine.close()
        self.pack.close()


def offload_of(model: PreTrainedModel) -> Offload:
    """`model.offload`, with its type."""
    handle = model.offload
    assert isinstance(handle, Offload)
    return handle
