"""The header and the tensors of a GGUF file, versions 2 and 3 (ggml's docs/gguf.md).

transformers' `dequantize` turns blocks into weights, except for the types below that it lacks. The
header is not read by transformers: its reader refuses the later files of a model in several files
and all tensors of those types, and builds a list of any length that a damaged file asks for.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from offload.errors import CheckpointError
from offload.files import unreadable
from offload.model.formats.scaled import CHUNK_WEIGHTS, VALUES
from offload.model.layout import gguf_files

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
}  # metadata type -> how `struct` calls it; strings and arrays have no fixed size
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_LONGEST_LIST = 4096  # longer lists of numbers are a vocabulary's and are skipped
_ALIGNMENT = 32  # alignment of the tensors, where the metadata does not say


@dataclass(frozen=True)
class StoredTensor:
    """Where and how a file stores a tensor."""

    file: Path
    shape: tuple[int, ...]  # shape of the weights, the fastest dimension last
    kind: int  # ggml's type
    begin: int  # the first byte's position in the file


class _Header:
    """A file's metadata and its table of tensors.

    The file's bytes are read in order, with a `ValueError` for whatever lies outside the file.
    """

    def __init__(self, file: Path) -> None:
        self._data = np.memmap(file, mode="r", dtype=np.uint8).data
        self._at = 0
        self.fields: dict[str, Any] = {}  # of lists that are skipped, the length
        self._begins: dict[str, int] = {}  # where the value of a field lies
        self.tensors: dict[str, StoredTensor] = {}
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, 2 and 3 are read")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        for _ in range(field_count):
            name = self._string()
            if name in self.fields:
                raise ValueError(f"{name} is there twice")
            self._begins[name] = self._at
            self.fields[name] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise ValueError(f"{name} is there twice")
            self.tensors[name] = StoredTensor(file, shape, kind, start + offset)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        if not 0 < math.prod(shape) < 2**62:
            raise ValueError(f"{name} has shape {shape}")
        return name, shape, self._number("<I"), self._number("<Q")

    def read_list(self, name: str) -> list[Any]:
        self._at = self._begins[name]
        value = self._value(self._number("<I"), whole=True)
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        return value

    def _value(self, kind: int, *, whole: bool = False) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._format(kind))
        inner, length = self._number("<I"), self._number("<Q")
        if inner == _STRING and whole:
            return [self._string() for _ in range(length)]
        if inner == _STRING:
            for _ in range(length):
                self._take(self._number("<Q"))
            return length
        form = self._format(inner)
        data = self._take(length * struct.calcsize(form))
        if length > _LONGEST_LIST and not whole:
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


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at byte `at` of each block [n, bytes], as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] uint8 -> [..., 2n]: the low halves of all bytes, then their high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Numbers [n, 32], of which `low` [n, 16] has four bits each and `high` [n, 4] the fifth."""
    fifth = (high[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return _nibbles(low) | (fifth.flatten(1) << 4)


def _trits(packed: Tensor, count: int) -> Tensor:
    """[n, bytes] uint8 -> the `count` digits to base 3 in each byte, as [n, count * bytes].

    A byte holds its digits as a fraction of 256, so that times 3 the next digit carries out of it.
    """
    powers = torch.tensor([1, 3, 9, 27, 81][:count], dtype=torch.uint8)
    return ((packed[:, None] * powers[:, None]).int() * 3 >> 8).flatten(1)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_five_bits(blocks[:, 6:], blocks[:, 2:6]).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _five_bits(blocks[:, 8:], blocks[:, 4:8]) + _half(blocks, 2)


def _tq1_0(blocks: Tensor) -> Tensor:
    trits = [_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)]
    return _half(blocks, 52) * (torch.cat(trits, dim=1) - 1)


def _tq2_0(blocks: Tensor) -> Tensor:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    codes = blocks[:, :64].reshape(-1, 2, 1, 32) >> shifts & 3
    return _half(blocks, 64) * (codes.flatten(1).float() - 1)


def _mxfp4(blocks: Tensor) -> Tensor:
    scale = blocks[:, :1].contiguous().view(torch.float8_e8m0fnu).float()
    return scale * (VALUES[_nibbles(blocks[:, 1:]).int()] + 0.0)  # + 0.0: ggml has no minus zero


def _nvfp4(blocks: Tensor) -> Tensor:
    scale = (blocks[:, :4, None] & 127).view(torch.float8_e4m3fn).float().nan_to_num(nan=0.0)
    values = VALUES[_nibbles(blocks[:, 4:].reshape(-1, 4, 8)).int()] + 0.0
    return (scale * values).flatten(1)


Unpack = Callable[[Tensor], Tensor]  # blocks [n, bytes] uint8 -> their weights in float32
_OTHER_BLOCKS: dict[int, tuple[int, int, Unpack]] = {  # as GGML_BLOCK: weights, bytes
    6: (32, 22, _q5_0),
    7: (32, 24, _q5_1),
    34: (256, 54, _tq1_0),
    35: (256, 66, _tq2_0),
    39: (32, 17, _mxfp4),
    40: (64, 36, _nvfp4),
}
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's types without blocks


def block_size(kind: int) -> tuple[int, int] | None:
    """How many weights and bytes a block of ggml's type `kind` has; None where it is not read."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    return _OTHER_BLOCKS[kind][:2] if kind in _OTHER_BLOCKS else GGML_BLOCK.get(kind)


class GgufFile:
    """A GGUF model's tensors and metadata. A tensor is read from the mapped file when asked for."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Read the headers of `path` and its other parts; quantised tensors are given in `dtype`.

        Raises `CheckpointError`.
        """
        self.path = path
        self._dtype = dtype
        self._data: dict[Path, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.fields: dict[str, Any] = {}
        self._headers: list[_Header] = []
        for file in gguf_files(path):
            try:
                header = _Header(file)
            except PermissionError:
                raise unreadable(file) from None
            except (OSError, ValueError, struct.error, OverflowError) as error:
                raise CheckpointError(
                    f"{file} is not a whole GGUF file ({error}): fetch it again"
                ) from None
            self._headers.append(header)
            self.fields = {**header.fields, **self.fields}  # the first part has most of it
            if twice := self.tensors.keys() & header.tensors.keys():
                raise CheckpointError(f"{file} has {min(twice)} again: its parts do not belong")
            self.tensors.update(header.tensors)
            self._data[file] = np.memmap(file, mode="r", dtype=np.uint8)
        for name, tensor in self.tensors.items():
            self._check(name, tensor)

    def read_list(self, name: str) -> list[Any]:
        """The list `name` of the metadata, of which `fields` may have only the length.

        It is empty when the file has none. Raises `ValueError` when it is something else.
        """
        found = [header for header in self._headers if name in header.fields]
        return found[0].read_list(name) if found else []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return PLAIN.get(self.tensors[name].kind, self._dtype)

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self._read(tensor, 0, tensor.shape)

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index : index + 1]`; only that part is read and dequantised."""
        tensor = self.tensors[name]
        return self._read(tensor, index, (1, *tensor.shape[1:]))

    def _check(self, name: str, tensor: StoredTensor) -> None:
        """Raise `CheckpointError` unless all of `tensor` is in its file and can be dequantised."""
        block = block_size(tensor.kind)
        if block is None:
            raise CheckpointError(
                f"{name} in {tensor.file} is stored as ggml type {tensor.kind}, which is not read: "
                "use a file in Q4_0 to Q8_0, a K-quant or F16"
            )
        if tensor.shape[-1] % block[0]:
            raise CheckpointError(
                f"{name} in {tensor.file} has rows of {tensor.shape[-1]} values, not of whole "
                f"blocks of {block[0]}: fetch it again"
            )
        end = tensor.begin + math.prod(tensor.shape) // block[0] * block[1]
        if end > len(self._data[tensor.file]):
            raise CheckpointError(f"{tensor.file} ends before {name} does: fetch it again")

    def _read(self, tensor: StoredTensor, index: int, shape: tuple[int, ...]) -> Tensor:
        """The `index`th part of `shape`, dequantised in pieces that bound the memory it takes."""
        block = block_size(tensor.kind)
        assert block is not None, "checked when the file was opened"
        size = math.prod(shape) // block[0] * block[1]
        begin = tensor.begin + index * size
        data = self._data[tensor.file][begin : begin + size]
        if tensor.kind in PLAIN:
            plain = torch.from_numpy(np.array(data))  # a copy: the mapping is read-only
            return plain.view(PLAIN[tensor.kind]).reshape(shape)
        blocks = data.reshape(-1, block[1])
        out = torch.empty(len(blocks), block[0], dtype=self._dtype)
        step = max(1, CHUNK_WEIGHTS // block[0])
        for first in range(0, len(blocks), step):
            part = torch.from_numpy(np.array(blocks[first : first + step]))
            if tensor.kind in _OTHER_BLOCKS:
                out[first : first + step] = _OTHER_BLOCKS[tensor.kind][2](part)
            else:
                out[first : first + step] = dequantize(part, tensor.kind).view(-1, block[0])
        return out.reshape(shape)
