"""What a checkpoint will hold, told by the model that is built from its config.

Knows: a model's own parameters. Does not know: files; there are none, and nothing can be read.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.errors import CheckpointError


class ExpectedSource:
    """A source of `model`'s parameters (on meta) that knows names, shapes and dtypes alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        tied = model.all_tied_weights_keys
        state: dict[str, Tensor] = model.state_dict()
        self._state = {name: tensor for name, tensor in state.items() if name not in tied}

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> NoReturn:
        raise CheckpointError(f"{name} is not here: only the model's config is")

    def read_slice(self, name: str, index: int) -> NoReturn:
        self.read(name)


CHUNK_WEIGHTS = 2**22  # dequantised at a time on the way to a large tensor, to bound memory


class TensorSource(Protocol):
    """Tensors by name. Nothing is read or dequantised before it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what `read` gives."""

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives. Raises `CheckpointError` for one that is not read."""

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index : index + 1]`; only that part is read and dequantised."""
