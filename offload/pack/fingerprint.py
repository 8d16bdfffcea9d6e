"""Tells whether checkpoints have the same weights, wherever their files are and whenever they came.

torch is imported only for GGUF files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError
from offload.files import read_object
from offload.model.layout import gguf_files, is_gguf, weight_files

SAMPLE = 4096  # bytes
SAMPLES = 64  # of each file, beside those of the tensors outside the experts
PREFIX = "weights-"  # of this module's fingerprints; those of earlier packs have none
_OF_EXPERTS = re.compile(r"experts|exps")


@dataclass(frozen=True)
class _WeightFile:
    """One file of weights: what its header says, and where the tensors lie."""

    path: Path
    table: list[tuple[str, str, list[int]]]  # name, type and shape of each tensor
    begin: int  # the first tensor's position
    end: int
    marks: list[int]  # positions of the tensors that are not experts'


def fingerprint(path: Path) -> str:
    """A digest of the weights in a checkpoint folder or GGUF file. Raises `CheckpointError`.

    It covers what the config says about quantisation; names, types and shapes of all tensors; and
    samples of 4 KiB: one of every tensor that is not an expert's, and 64 more of each file. Names
    of files, times, and all else in the config may change.
    """
    digest = hashlib.sha256()
    if is_gguf(path):
        files = list(_gguf_weights(path))
    else:
        config = read_object(path / "config.json")
        parts = [config.get("quantization_config"), config.get("text_config")]
        if isinstance(parts[1], dict):
            parts[1] = parts[1].get("quantization_config")
        digest.update(json.dumps(parts, sort_keys=True).encode())
        files = [_safetensors_weights(path / name) for name in weight_files(path)]
    for file in files:
        digest.update(json.dumps(file.table).encode())
        spread = range(file.begin, file.end, max(SAMPLE, -(-(file.end - file.begin) // SAMPLES)))
        with file.path.open("rb") as handle:
            for start in sorted({*spread, *file.marks}):
                handle.seek(start)
                digest.update(handle.read(min(SAMPLE, file.end - start)))
    return PREFIX + digest.hexdigest()


def _safetensors_weights(file: Path) -> _WeightFile:
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        table = [(name, entry["dtype"], entry["shape"]) for name, entry in sorted(header.items())]
        begins = {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): fetch it again"
        ) from None
    marks = [begin for name, begin in begins.items() if not _OF_EXPERTS.search(name)]
    return _WeightFile(file, table, 8 + size, end, marks)


def _gguf_weights(path: Path) -> Iterator[_WeightFile]:
    from offload.model.formats.gguf import GgufFile, block_size

    tensors = sorted(GgufFile(path).tensors.items())
    for file in gguf_files(path):
        mine = [(name, tensor) for name, tensor in tensors if tensor.file == file]
        table, marks, ends = [], [], [0]
        for name, tensor in mine:
            weights, size = block_size(tensor.kind) or (1, 0)
            table.append((name, str(tensor.kind), list(tensor.shape)))
            ends.append(tensor.begin + math.prod(tensor.shape) // weights * size)
            if not _OF_EXPERTS.search(name):
                marks.append(tensor.begin)
        begin = min((tensor.begin for _, tensor in mine), default=0)
        yield _WeightFile(file, table, begin, max(ends), marks)


def stamp(path: Path) -> str:
    """A digest of place, sizes and times, which is quick to make: while it stays the same, the
    weights at `path` are believed to be the same. Raises `CheckpointError`."""
    if path.is_dir():
        files = [path / name for name in ("config.json", *weight_files(path))]
    else:
        files = gguf_files(path)
    stats = [(str(file), file.stat()) for file in files]
    told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr((str(path.resolve()), told)).encode()).hexdigest()


GGUF_HEADER = 2**16  # bytes at the start of a GGUF file that `former_fingerprint` covers


def former_fingerprint(path: Path) -> str:
    """The fingerprint that packs got before `PREFIX` marked them, which depends on times."""
    digest = hashlib.sha256()
    if path.is_dir():
        digest.update((path / "config.json").read_bytes())
        files = [path / name for name in weight_files(path)]
    else:
        files = gguf_files(path)
    for file in files:
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        digest.update(f"{file.name} {size} {changed}".encode())
        with file.open("rb") as handle:
            header = int.from_bytes(handle.read(8), "little") if path.is_dir() else GGUF_HEADER
            digest.update(handle.read(header))
            for start in range(8 + header, size, max(4096, math.ceil((size - header) / 64))):
                handle.seek(start)
                digest.update(handle.read(4096))
    return digest.hexdigest()
