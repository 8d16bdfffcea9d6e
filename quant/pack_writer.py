"""Writes a pack one layer at a time, so that a kill at any moment loses at most one layer.

Everything is written into `<pack>.partial`, each file under a `.part` name until it is whole. The
manifest is the last file, and renaming the folder is the last step. Two processes that make the
same pack take turns.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from offload.quant.errors import PackError
from offload.quant.manifest import MANIFEST, file_sha256, is_pack, manifest_check
from offload.quant.pack import (
    Pack,
    PackInfo,
    PackLayer,
    as_buffer,
    layer_header,
    safetensors_header,
)

logger = logging.getLogger("offload")


def take_turn(file: Path, what: str) -> FileLock:
    """Wait for the lock `file` and take it; use it as a context manager or `release` it.

    Raises `OSError` if the file cannot be made. filelock would take some of these errors for a lock
    that another process holds, and wait for ever.
    """
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that is making %s", what)
        lock.acquire()
    return lock


SETTINGS = ".settings"
ELSEWHERE = "another place (--pack-dir or OFFLOAD_HOME; for quantize, another DST)"


class PackWriter:
    """Writes the pack `path` that `info` describes; use as a context manager.

    Entering waits for another process that makes the same pack. `done` says whether the pack is
    finished, so that nothing is left to write. Files that were finished by an interrupted run with
    the same `info` are kept.
    """

    def __init__(self, path: Path, info: PackInfo) -> None:
        self.path = path
        self.info = info
        self._partial = path.with_name(path.name + ".partial")
        self.done = False
        self._names: set[str] = set()  # names of the files that belong to the pack

    def __enter__(self) -> PackWriter:
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_file = self.path.with_name(self.path.name + ".lock")
            self._lock = take_turn(lock_file, str(self.path))
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        lock_file = Path(self._lock.lock_file)
        with suppress(OSError):  # Windows removes no open file; who waits for it takes a new one
            if not lock_file.stat().st_size:  # else it is somebody's own, like uv.lock
                lock_file.unlink()
        self._lock.release()

    def _prepare(self) -> None:
        if not self.path.exists():
            with _disk_errors(self.path):
                if not is_pack(self._partial):
                    self._begin()
                    return
                # An earlier run was killed between its last two steps.
                (self._partial / SETTINGS).unlink(missing_ok=True)
                self._partial.rename(self.path)
        if not is_pack(self.path):
            raise PackError(f"{self.path} exists and is not a pack: name a new folder")
        with closing(Pack(self.path)) as pack:
            if pack.info != self.info:
                raise PackError(f"{self.path} is a pack of something else: name a new folder")
        self.done = True

    def _begin(self) -> None:
        settings = json.dumps(self.info.to_json(), sort_keys=True).encode()
        file = self._partial / SETTINGS
        if not file.is_file() or file.read_bytes() != settings:
            self._remove_partial()
            self._partial.mkdir()
            _write_whole(file, [settings], self.path)

    def _remove_partial(self) -> None:
        """Remove the folder of an interrupted run that had other settings and finished no layer.

        Raises `PackError` if that run did finish a layer, which may be hours of work, or if the
        folder is not this program's.
        """
        names = (
            {entry.name for entry in self._partial.iterdir()} if self._partial.exists() else set()
        )
        if names and not names & {SETTINGS, SETTINGS + ".part"}:
            raise PackError(
                f"{self._partial} was not made by this program: move it or name another place"
            )
        if PackLayer.file_name(0) in names:
            raise PackError(
                f"{self._partial} is an interrupted pack with other settings: remove it, finish it "
                "with those settings, or name another place"
            )
        shutil.rmtree(self._partial, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether this or an earlier run finished the file `name`; such a file is kept."""
        if (self._partial / name).is_file():
            self._names.add(name)
        return name in self._names

    def write_layer(self, layer: int, records: Iterable[Tensor]) -> None:
        """Write one MoE layer from the records [record_bytes] uint8 of its experts, in order."""
        experts = self.info.layers[layer].num_experts
        record_bytes = self.info.layout_of(layer).record_bytes

        def chunks() -> Iterator[bytes | memoryview]:
            yield layer_header(experts, record_bytes)
            checksums = []
            for record in records:
                data = as_buffer(record)
                checksums.append(zlib.crc32(data))
                yield data
            assert len(checksums) == experts, f"{len(checksums)} records for {experts} experts"
            yield struct.pack(f"<{experts}q", *checksums)

        self._write(PackLayer.file_name(layer), chunks())

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file unchanged. Only `finish` writes a manifest."""
        if name != MANIFEST:
            self._write(name, [data])

    def write_tensors(
        self, name: str, tensors: Iterable[tuple[str, str, tuple[int, ...], Tensor]]
    ) -> None:
        """Write a safetensors file of tensors given as name, safetensors dtype, shape and bytes."""
        parts = list(tensors)
        header = safetensors_header((*part[:3], part[3].numel()) for part in parts)
        self._write(name, itertools.chain([header], (as_buffer(part[3]) for part in parts)))

    def _write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        _write_whole(self._partial / name, chunks, self.path)
        self._names.add(name)

    def finish(self) -> None:
        """Write the manifest of all files, and give the folder its final name."""
        with _disk_errors(self.path):
            for file in self._partial.iterdir():
                if file.name not in self._names | {SETTINGS}:
                    file.unlink()  # an earlier run wrote it, and this pack has no such file
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(self._partial.iterdir())
                if file.name != SETTINGS
            }
            manifest = {**self.info.to_json(), "files": files}
            manifest["check"] = manifest_check(manifest)
            data = json.dumps(manifest, indent=1).encode()
            _write_whole(self._partial / MANIFEST, [data], self.path)
            (self._partial / SETTINGS).unlink()
            _sync(self._partial)  # a power cut must not spare the manifest and lose its files
            self._partial.rename(self.path)
            _sync(self.path.parent)
        self.done = True


def _write_whole(file: Path, chunks: Iterable[bytes | memoryview], pack: Path) -> None:
    part = file.with_name(file.name + ".part")
    with _disk_errors(pack):
        handle = part.open("wb")
    try:
        for chunk in chunks:  # an error in making a chunk is not the disk's fault
            with _disk_errors(pack):
                handle.write(chunk)
        with _disk_errors(pack):
            handle.flush()
            os.fsync(handle.fileno())
    finally:
        with suppress(OSError):  # closing tries again to write what failed before
            handle.close()
    with _disk_errors(pack):
        part.rename(file)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PackError(
                f"the disk is full while writing {path}: free some space and run the same command "
                f"again, which continues where it stopped; or choose {ELSEWHERE}"
            ) from None
        raise PackError(
            f"cannot write {path}: {error.strerror or error}: choose {ELSEWHERE}"
        ) from None
