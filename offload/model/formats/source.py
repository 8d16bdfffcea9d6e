"""The protocol by which tensors are read, and a source that only knows a model's shapes."""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.errors import CheckpointError


class ExpectedSource:
    """A source of `model`'s parameters that knows names, shapes and dtypes, and reads nothing.

    `model` is on meta. It stands for a checkpoint of which only the config has been fetched.
    """

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
        raise CheckpointError(f"{name} cannot be read: only the model's config is here")

    def read_slice(self, name: str, index: int) -> NoReturn:
        self.read(name)


CHUNK_WEIGHTS = 2**22  # weights of a large tensor that are dequantised at a time


class TensorSource(Protocol):
    """Tensors by name, each of them read and dequantised when it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `read` returns."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor that `read` returns.

        Raises `CheckpointError` for a stored dtype that is not read.
        """

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index : index + 1]`, of which only that part is read and dequantised."""
