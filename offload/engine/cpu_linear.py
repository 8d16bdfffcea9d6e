"""Chooses which of torch's two CPU libraries multiplies one token's bfloat16 vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def native_is_quicker() -> bool:
    """Whether torch's own kernel multiplies one row quicker than oneDNN on this CPU.

    A decode step calls a linear layer hundreds of times with one row, and oneDNN's overhead a call
    can exceed the product of a small layer. With AVX-512 torch's own kernel is then quicker
    (docs/log.md); with less it can be many times slower. The answer follows the processor, never a
    stopwatch: the two libraries round differently, and logits must not depend on the load.
    """
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


class OneTokenLinear:
    """Switches oneDNN off while a model works on a single token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._before: bool | None = None  # the state to put oneDNN's switch back to
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave()  # torch skips the leaving hook when Ctrl-C ends a forward
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.numel() == 1:
            self._before = torch.backends.mkldnn.set_flags()[0]
            torch.backends.mkldnn.set_flags(False)

    def _leave(self, *_: Any) -> None:
        if self._before is not None:
            torch.backends.mkldnn.set_flags(self._before)
            self._before = None

    def close(self) -> None:
        """Leave the model as it was."""
        self._leave()
        for hook in self._hooks:
            hook.remove()
