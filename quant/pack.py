"""The pack: a quantised model on disk, opened by mapping its files.

A folder becomes a pack with its manifest, which is therefore written last.

    manifest.json                what this module reads
    experts-00007.safetensors    a MoE layer: `records` [E, record_bytes] uint8, `crc32` [E] int64
    dense-00003.safetensors      quantised matrices outside the experts, one record each
    model-00001.safetensors ...  all other tensors, under the checkpoint's names
    config.json, tokenizer ...   copied from the checkpoint

Letters: E experts of a layer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload.quant.errors import PackError
from offload.quant.record import RecordLayout

FORMAT = "moe-offload pack"
VERSION = 2
MANIFEST = "manifest.json"
REMAKE = "delete the folder and load the model again to remake it"
DATA_ALIGNMENT = 4096  # bytes; records begin at a page, so that their mapping can be pinned

_SEEKING = threading.Lock()


def read_at(file: int, begin: int, into: memoryview) -> int:
    """Fill `into` with the bytes of `file` from `begin` on, as far as the file reaches.

    Returns how many bytes were read. Raises `OSError`.
    """
    done = 0
    while done < len(into) and (count := _read_some(file, begin + done, into[done:])):
        done += count
    return done


def _read_some(file: int, begin: int, into: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], begin)
    with _SEEKING:  # threads share the file's position
        os.lseek(file, begin, os.SEEK_SET)
        data = os.read(file, len(into))
    into[: len(data)] = data
    return len(data)


@dataclass(frozen=True)
class PackLayer:
    """One MoE layer of a pack."""

    module: str  # path of the experts module in the model
    num_experts: int
    layout: int  # index into `PackInfo.layouts`

    @staticmethod
    def file_name(index: int) -> str:
        return f"experts-{index:05d}.safetensors"


@dataclass(frozen=True)
class PackDense:
    """A quantised matrix outside the experts, and where its record is."""

    # Paths of the modules that use the matrix; a token table that is also the head has two. The
    # first path names the record.
    modules: tuple[str, ...]
    layout: int  # index into `PackInfo.dense_layouts`
    file: int

    @property
    def file_name(self) -> str:
        return f"dense-{self.file:05d}.safetensors"


@dataclass(frozen=True)
class PackInfo:
    """What a pack was made from and how: the manifest without its checksums."""

    source: str
    fingerprint: str
    bits: str  # the recipe as text, which tells how each part of the model is stored
    dense_parameters: int  # weights that are not experts
    layouts: tuple[RecordLayout, ...]
    layers: tuple[PackLayer, ...]
    dense_layouts: tuple[RecordLayout, ...] = ()
    dense: tuple[PackDense, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PackInfo:
        """Read what `to_json` wrote.

        Raises `KeyError`, `TypeError` or `ValueError` on anything that it would not write.
        """
        info = cls(
            source=str(data["source"]),
            fingerprint=str(data["fingerprint"]),
            bits=str(data["bits"]),
            dense_parameters=int(data["dense_parameters"]),
            layouts=tuple(RecordLayout.from_json(layout) for layout in data["layouts"]),
            layers=tuple(PackLayer(**layer) for layer in data["layers"]),
            dense_layouts=tuple(RecordLayout.from_json(lay) for lay in data["dense_layouts"]),
            dense=tuple(
                PackDense(tuple(map(str, dense["modules"])), dense["layout"], dense["file"])
                for dense in data["dense"]
            ),
        )
        info._check()
        return info

    def _check(self) -> None:
        for members, layouts in ((self.layers, self.layouts), (self.dense, self.dense_layouts)):
            for number in (member.layout for member in members):
                if type(number) is not int or not 0 <= number < len(layouts):
                    raise ValueError("a layout that is not there")
        counts = [*(layer.num_experts for layer in self.layers), *(d.file + 1 for d in self.dense)]
        if any(type(count) is not int or count < 1 for count in counts):
            raise ValueError("a layer without experts, or a file without a number")
        modules = [path for dense in self.dense for path in dense.modules]
        if len(set(modules)) < len(modules) or not all(dense.modules for dense in self.dense):
            raise ValueError("a matrix of two records, or a record of no matrix")
        for layout in self.dense_layouts:
            if [(m.name, m.group_size > 0) for m in layout.matrices] != [("weight", True)]:
                raise ValueError("a record beside the experts' that is not of one quantised matrix")
        if self.dense_parameters < sum(self.dense_layout(d).weights for d in self.dense):
            raise ValueError("more quantised weights than there are")

    def layout_of(self, layer: int) -> RecordLayout:
        return self.layouts[self.layers[layer].layout]

    def dense_layout(self, dense: PackDense) -> RecordLayout:
        return self.dense_layouts[dense.layout]

    def dense_bytes(self, itemsize: int) -> int:
        """Bytes of everything but experts if unquantised weights take `itemsize` bytes each."""
        layouts = [self.dense_layout(dense) for dense in self.dense]
        as_stored = self.dense_parameters - sum(layout.weights for layout in layouts)
        return as_stored * itemsize + sum(layout.record_bytes for layout in layouts)

    @property
    def total_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """The bytes of all experts' records."""
        return sum(n.num_experts * self.layouts[n.layout].record_bytes for n in self.layers)

    @property
    def parameters(self) -> int:
        """How many weights the whole model has."""
        experts = (n.num_experts * self.layouts[n.layout].weights for n in self.layers)
        return sum(experts) + self.dense_parameters

    @property
    def slot_bytes(self) -> int:
        """The bytes of an expert slot that can hold any record of this pack."""
        return max(layout.record_bytes for layout in self.layouts)


def as_buffer(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers


def is_pack(path: Path) -> bool:
    """Whether `path` is a pack, perhaps a damaged one.

    Other programs write a manifest.json as well. A folder with one is a pack if the manifest says
    so, or if the first layer's expert file lies beside it.
    """
    if not (path / MANIFEST).is_file():
        return False
    if (path / PackLayer.file_name(0)).is_file():
        return True
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_check(manifest: dict[str, Any]) -> str:
    """The checksum that a manifest carries as `check`, made from its other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_info(path: Path) -> PackInfo:
    """What the pack at `path` was made from and how; only its manifest is read.

    Raises `PackError`.
    """
    return _read_manifest(path)[0]


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The header of a file with `tensors`, each a name, safetensors dtype, shape and size in bytes.

    The header is padded so that the data behind it begins at a multiple of `DATA_ALIGNMENT`.
    """
    header, end = {}, 0
    for name, dtype, shape, size in tensors:
        offsets = [end, end + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(header).encode()
    padding = -(8 + len(text)) % DATA_ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def layer_header(experts: int, record_bytes: int) -> bytes:
    """The header of the file of a layer with `experts` experts; records and checksums follow."""
    records = ("records", "U8", (experts, record_bytes), experts * record_bytes)
    return safetensors_header([records, ("crc32", "I64", (experts,), 8 * experts)])


class LayerFile(NamedTuple):
    """The opened and mapped file of a layer."""

    file: BinaryIO
    stamp: tuple[int, int]  # the file's `_stamp` when it was opened
    begin: int  # the byte at which the records begin
    records: Tensor  # [E, record_bytes] uint8, mapped
    checksums: list[int]

    @classmethod
    def map(cls, file: BinaryIO, experts: int, record_bytes: int) -> LayerFile:
        """Map an opened file. Raises `PackError` unless `layer_header` and the size fit it."""
        stamp = _stamp(file.fileno())
        header, size = layer_header(experts, record_bytes), experts * record_bytes
        begin = len(header)
        if stamp[0] != begin + size + 8 * experts or file.read(begin) != header:
            raise PackError(
                f"{file.name} does not hold {experts} records as the manifest says: {REMAKE}"
            )
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # an empty file has none
        data = torch.frombuffer(mapping, dtype=torch.uint8)[begin:]  # keeps the file mapped
        records, checksums = data[:size].view(experts, record_bytes), data[size:].view(torch.int64)
        return cls(file, stamp, begin, records, checksums.tolist())


class Pack:
    """An opened pack. Its records are views of mapped files, so reading one reads the disk."""

    def __init__(self, path: Path) -> None:
        """Open and check the pack at `path`.

        Every file's size is checked, and every file's checksum except those of the expert files,
        whose records `check_record` checks. Raises `PackError`.
        """
        self.path = path
        self.info, self._files = _read_manifest(path)
        expert_files = [PackLayer.file_name(i) for i in range(len(self.info.layers))]
        dense_files = [dense.file_name for dense in self.info.dense]
        if not expert_files or not self._files.keys() >= {*expert_files, *dense_files}:
            raise PackError(f"{path / MANIFEST} does not list its own files: {REMAKE}")
        for name, (size, sha256) in self._files.items():
            _check_file(path, name, size, sha256 if name not in expert_files else None)
        with ExitStack() as opened:
            self._layers = [
                LayerFile.map(
                    opened.enter_context((path / name).open("rb")),
                    self.info.layers[index].num_experts,
                    self.info.layout_of(index).record_bytes,
                )
                for index, name in enumerate(expert_files)
            ]
            self._opened = opened.pop_all()

    def record(self, layer: int, expert: int) -> Tensor:
        """The mapped record [record_bytes] uint8 of one expert. Do not write to it.

        Raises `PackError` if the file was written to since it was opened: the mapping may then show
        other bytes, and reading beyond the file's new end would kill this process.
        """
        self.check_unchanged(layer)
        return self._layers[layer].records[expert]

    def check_unchanged(self, layer: int) -> None:
        """Raise `PackError` if a layer's file was written to since it was opened."""
        if _stamp(self.descriptor(layer)) != self._layers[layer].stamp:
            raise PackError(
                f"{self._layers[layer].file.name} was changed while it was in use: leave packs "
                f"alone while a model runs; load it again, and if that fails, {REMAKE}"
            )

    def descriptor(self, layer: int) -> int:
        """The descriptor of a layer's mapped file, even if its name now belongs to another file."""
        return self._layers[layer].file.fileno()

    def read_at(self, layer: int, begin: int, into: memoryview) -> int:
        """Read a layer's file as the function `read_at` does. Raises `PackError`."""
        try:
            return read_at(self.descriptor(layer), begin, into)
        except OSError as error:
            file = self._layers[layer].file.name
            raise PackError(
                f"cannot read {file} ({error.strerror or error}): look after the disk it is on; "
                f"if that is well, {REMAKE}"
            ) from None

    def place(self, layer: int, expert: int) -> tuple[Path, int]:
        """The file that holds a record, and the byte at which the record begins."""
        file = self._layers[layer]
        return Path(file.file.name), file.begin + expert * file.records.shape[1]

    def check_record(self, layer: int, expert: int, record: Tensor | None = None) -> None:
        """Raise `PackError` if a record's bytes are not those that were written.

        If given, `record` is a copy that is checked in place of the mapped bytes.
        """
        record = self.record(layer, expert) if record is None else record
        if zlib.crc32(as_buffer(record)) != self._layers[layer].checksums[expert]:
            raise PackError(
                f"{self._layers[layer].file.name}: the bytes of expert {expert} do not match their "
                f"checksum: {REMAKE}"
            )

    def dense_records(self) -> Iterator[tuple[PackDense, Tensor]]:
        """Yield every quantised matrix outside the experts, and its record.

        A record is [record_bytes] uint8, read when its turn comes. Raises `PackError` if a file
        lacks a record that the manifest names.
        """
        for _, group in itertools.groupby(self.info.dense, key=lambda dense: dense.file):
            members = list(group)
            file = self.path / members[0].file_name
            try:
                with safe_open(file, framework="pt") as handle:
                    for dense in members:
                        name, size = dense.modules[0], self.info.dense_layout(dense).record_bytes
                        record = handle.get_tensor(name)
                        if record.dtype != torch.uint8 or record.shape != (size,):
                            raise ValueError(f"{name} has not {size} bytes")
                        yield dense, record
            except (SafetensorError, ValueError) as error:
                raise PackError(f"{file} is damaged ({error}): {REMAKE}") from None

    @property
    def total_bytes(self) -> int:
        """The bytes of all the pack's files."""
        return sum(size for size, _ in self._files.values())

    def close(self) -> None:
        """Unmap and close the files; no record may be used afterwards."""
        self._layers.clear()  # a mapping ends with its last view
        self._opened.close()


def _stamp(file: int) -> tuple[int, int]:
    """An open file's size, and the time of its last change."""
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _read_manifest(path: Path) -> tuple[PackInfo, dict[str, tuple[int, str]]]:
    """What the manifest says: how the pack was made, and each file's size and SHA-256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(
            f"{path} is not a pack: cannot read {MANIFEST} ({error}): {REMAKE}"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackError(f"{path / MANIFEST} is not a {FORMAT}: {REMAKE}")
    if manifest.get("version") != VERSION:
        raise PackError(
            f"{path} is a pack of version {manifest.get('version')}, this program reads version "
            f"{VERSION}: {REMAKE}"
        )
    if manifest.pop("check", None) != manifest_check(manifest):
        raise PackError(f"{path / MANIFEST} does not match its checksum: {REMAKE}")
    try:
        return PackInfo.from_json(manifest), {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = repr(error)[:200]  # some messages quote all of their input
        raise PackError(f"{path / MANIFEST} is damaged ({reason}): {REMAKE}") from None


def _check_file(path: Path, name: str, size: int, sha256: str | None) -> None:
    file = path / name
    if Path(name).name != name:
        raise PackError(f"{path / MANIFEST} names a file outside the pack ({name}): {REMAKE}")
    if not file.is_file():
        raise PackError(f"{file} is missing: {REMAKE}")
    if (found := file.stat().st_size) != size:
        raise PackError(f"{file} has {found} bytes where the manifest says {size}: {REMAKE}")
    if sha256 is not None and file_sha256(file) != sha256:
        raise PackError(f"{file} does not match its checksum: {REMAKE}")
