"""GGUF files' tensors under the names llama.cpp gives them, dequantised by the gguf library.

Knows: ggml's types, and where a slice of a tensor lies. Does not know: models.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import CheckpointError, SourceError
from offload.model.formats.gguf import StoredTensor, read_header
from offload.model.formats.gguf_files import gguf_files
from offload.model.formats.source_part import CHUNK_WEIGHTS

_F32, _F16, _BF16 = 0, 1, 30  # ggml's types of plain values
PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}


class GgufFile:
    """A GGUF model's tensors and metadata. Nothing of a tensor is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the headers of `path` and its other parts. Raises `CheckpointError`."""
        library()
        self.path = path
        self._data: dict[Path, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.fields: dict[str, Any] = {}
        for file in gguf_files(path):
            header = read_header(file)
            self.fields = {**header.fields, **self.fields}  # the first part has most of it
            if twice := self.tensors.keys() & header.tensors.keys():
                raise CheckpointError(f"{file} has {min(twice)} again: its parts do not belong")
            self.tensors.update(header.tensors)
            self._data[file] = np.memmap(file, mode="r", dtype=np.uint8)
        for name, tensor in self.tensors.items():
            self._check(name, tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """bfloat16 for whatever is quantised."""
        return PLAIN.get(self.tensors[name].kind, torch.bfloat16)

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self._dequantise(tensor, 0, tensor.shape)

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index]`; only that part is dequantised."""
        tensor = self.tensors[name]
        return self._dequantise(tensor, index, tensor.shape[1:])

    def _check(self, name: str, tensor: StoredTensor) -> None:
        """Raise `CheckpointError` unless all of `tensor` is in its file and can be dequantised."""
        gguf = library()
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            values, size = gguf.GGML_QUANT_SIZES[kind]
            if tensor.kind not in PLAIN:
                gguf.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise CheckpointError(
                f"{name} in {tensor.file} is stored as ggml type {tensor.kind}, which this version "
                "of the gguf library does not read: use a file in Q4_0 to Q8_0, a K-quant or F16"
            ) from None
        if tensor.shape[-1] % values:
            raise CheckpointError(
                f"{name} in {tensor.file} has rows of {tensor.shape[-1]} values, not of whole "
                f"blocks of {values}: fetch it again"
            )
        if tensor.begin + self._bytes(tensor, tensor.shape) > len(self._data[tensor.file]):
            raise CheckpointError(f"{tensor.file} ends before {name} does: fetch it again")

    def _bytes(self, tensor: StoredTensor, shape: tuple[int, ...]) -> int:
        gguf = library()
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        return math.prod(shape) // int(values) * int(size)

    def _dequantise(self, tensor: StoredTensor, index: int, shape: tuple[int, ...]) -> Tensor:
        """The `index`th part of `shape`, in pieces, so that little more than it is held."""
        size = self._bytes(tensor, shape)
        begin = tensor.begin + index * size
        data = self._data[tensor.file][begin : begin + size]
        if tensor.kind in PLAIN:
            plain = torch.from_numpy(np.array(data))  # a copy: the mapping is read-only
            return plain.view(PLAIN[tensor.kind]).reshape(shape)
        gguf = library()
        kind = gguf.GGMLQuantizationType(tensor.kind)
        rows = data.reshape(-1, self._bytes(tensor, shape[-1:]))
        out = torch.empty(len(rows), shape[-1], dtype=torch.bfloat16)
        step = max(1, CHUNK_WEIGHTS // shape[-1])
        for first in range(0, len(rows), step):
            part = gguf.dequantize(rows[first : first + step], kind)
            out[first : first + step] = torch.from_numpy(part)
        return out.reshape(shape)


def library() -> Any:
    """The gguf library. Raises `SourceError` where it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise SourceError("GGUF files need the gguf library: pip install gguf")
    import gguf

    return gguf
