"""The header of a GGUF file: its metadata, and where each tensor lies.

Knows: the GGUF format, versions 2 and 3 (ggml's docs/gguf.md). Does not know: what the tensors are
for, nor how their blocks become weights. The gguf library's own reader believes the counts it
finds, so that a damaged file can keep it busy for ever; this one holds each against the file.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import CheckpointError, SourceError
from offload.files import unreadable
from offload.model.formats.source import CHUNK_WEIGHTS

_FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}  # of the metadata types that have one size
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_LONGEST_LIST = 4096  # numbers; configs have one for each layer, vocabularies many more
ALIGNMENT = 32  # where the metadata does not say


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    file: Path
    shape: tuple[int, ...]  # of its weights, the fastest dimension last
    kind: int  # ggml's type
    begin: int  # byte in the file


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself."""

    fields: dict[str, Any]  # metadata; of a vocabulary its length
    tensors: dict[str, StoredTensor]


def read_header(file: Path) -> GgufHeader:
    """Raises `CheckpointError` when `file` is not a GGUF file, or not a whole one."""
    try:
        data = np.memmap(file, mode="r", dtype=np.uint8)
        return _Reader(file, data.data).header()
    except PermissionError:
        raise unreadable(file) from None
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"{file} is not a whole GGUF file ({error}): fetch it again"
        ) from None


class _Reader:
    """Walks over a file's bytes; anything that points outside them is a `ValueError`."""

    def __init__(self, file: Path, data: memoryview) -> None:
        self._file = file
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, 2 and 3 are read")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._string()
            if name in fields:
                raise ValueError(f"{name} is there twice")
            fields[name] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise ValueError(f"{name} is there twice")
            tensors[name] = StoredTensor(self._file, shape, kind, start + offset)
        return GgufHeader(fields, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        if not 0 < math.prod(shape) < 2**62:
            raise ValueError(f"{name} has shape {shape}")
        return name, shape, self._number("<I"), self._number("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._format(kind))
        inner, length = self._number("<I"), self._number("<Q")
        if inner == _STRING:
            for _ in range(length):
                self._take(self._number("<Q"))
            return length
        form = self._format(inner)
        data = self._take(length * struct.calcsize(form))
        if length > _LONGEST_LIST:
            return length
        return [value for (value,) in struct.iter_unpack(form, data)]

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError(f"a value has type {kind}")
        return _FORMATS[kind]

    def _string(self) -> str:
        return bytes(self._take(self._number("<Q"))).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> memoryview:
        begin, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("it ends too soon")
        return self._data[begin : self._at]


SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether `path` names a GGUF file rather than a checkpoint folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def gguf_files(path: Path) -> list[Path]:
    """All parts of the model that `path` is one of, in order. Raises `CheckpointError`."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    files = [
        path.with_name(f"{part['stem']}-{number:05d}-of-{part['count']}{path.suffix}")
        for number in range(1, int(part["count"]) + 1)
    ]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, a part of {path.name}: fetch it again")
    return files


def model_name(path: Path) -> str:
    """What the model in `path` is called."""
    part = _PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def models_in(folder: Path) -> list[Path]:
    """The GGUF models in `folder`, each by its first file."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*")):
        if is_gguf(file) and file.is_file():
            found.setdefault(model_name(file), file)
    return list(found.values())


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
