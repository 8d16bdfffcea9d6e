"""The header of a GGUF file: its metadata, and where each tensor lies.

Knows: the GGUF format, versions 2 and 3 (ggml's docs/gguf.md). Does not know: what the tensors are
for, nor how their blocks become weights. The gguf library's own reader believes the counts it
finds, so that a damaged file can keep it busy for ever; this one holds each against the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offload.errors import CheckpointError
from offload.json_file import unreadable

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
