"""A linear layer and a token table that compute from a pack's record."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offload.quant.matmul import dequantize, matmul, take_rows
from offload.quant.record import MatrixView


class _FromRecord(nn.Module):
    """A module whose weight [rows, columns] lies in the record given to `bind`."""

    def bind(self, view: MatrixView, dtype: torch.dtype) -> None:
        """Compute from `view` from now on, with results in `dtype`."""
        self.view, self._dtype = view, dtype

    @property
    def weight(self) -> Tensor:
        """The whole matrix [rows, columns], unpacked at each use, for code that reads `weight`."""
        return dequantize(self.view, self._dtype)


class QuantizedLinear(_FromRecord):
    """Takes the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shape = (linear.out_features, linear.in_features)
        self.bias = linear.bias  # not in the record: it stays a parameter of the model

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out = matmul(x.reshape(-1, self.in_features), self.view)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


class QuantizedEmbedding(_FromRecord):
    """Takes the place of an `nn.Embedding`."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.shape = (table.num_embeddings, table.embedding_dim)
        self.padding_idx = table.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim].

        On the CPU, raises `IndexError` for an id that is not in the table.
        """
        if ids.device.type == "cpu" and ids.numel():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"there is no row {int(high if low >= 0 else low)} in the table")
        return take_rows(self.view, ids.flatten(), self._dtype).view(*ids.shape, -1)
