"""Makes a pack from a checkpoint, a layer at a time."""

import functools
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from offload.machine.memory import ram
from offload.model.checkpoint import Checkpoint
from offload.model.formats.safetensors import DTYPES
from offload.model.layout import INDEX
from offload.pack.companions import companions
from offload.pack.describe import PackSource
from offload.pack.recipe import Recipe
from offload.progress import Progress
from offload.quant.encode import (
    DeviceEncoder,
    Encoder,
    HereEncoder,
    PendingRecord,
    WorkerEncoder,
)
from offload.quant.errors import PackError
from offload.quant.pack import PackDense, PackInfo, PackLayer
from offload.quant.pack_writer import ELSEWHERE, PackWriter
from offload.quant.record import RecordLayout
from offload.units import gib

Matrices = Mapping[str, tuple[Tensor, Tensor | None]]  # what `PendingRecord` takes
Part = tuple[RecordLayout, Callable[[], Matrices]]  # one record, and how to read its weights
WORTH_PROCESSES = 2**26  # with fewer weights, encoding here ends before processes have started
PROCESS_BYTES = 2**30  # free RAM asked for each process; torch alone takes a third of it
CHUNKS_AHEAD = 2  # chunks for each process: one is being encoded, one waits for the process


def make_encoder(weights: int, device: torch.device) -> AbstractContextManager[Encoder]:
    """The encoder for this many weights: the GPU, or on the CPU a process for each core where there
    are enough weights to be worth the start of processes."""
    if device.type != "cpu":
        return closing(DeviceEncoder(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, ram().available // PROCESS_BYTES)
    if weights < WORTH_PROCESSES or count < 2:
        return nullcontext(HereEncoder())
    return WorkerEncoder(count)


def encode_in_turn(parts: Iterable[Part], encoder: Encoder, progress: Progress) -> Iterator[Tensor]:
    """The record [record_bytes] uint8 of each part, in order.

    A record is valid until the next one is asked for. Parts are read ahead of it, at least two and
    as many as keep every process of the encoder busy.
    """
    pending: deque[tuple[RecordLayout, PendingRecord]] = deque()
    buffer = torch.empty(0, dtype=torch.uint8)

    def finish() -> Tensor:
        nonlocal buffer
        layout, record = pending.popleft()
        if len(buffer) != layout.record_bytes:
            buffer = torch.empty(layout.record_bytes, dtype=torch.uint8)
        record.write(buffer)
        progress.advance(layout.weights, layout.record_bytes)
        return buffer

    for layout, read in parts:
        chunks = sum(record.chunks for _, record in pending)
        while len(pending) > 1 and chunks >= CHUNKS_AHEAD * encoder.width:
            chunks -= pending[0][1].chunks
            yield finish()
        pending.append((layout, PendingRecord(layout, read(), encoder)))
    while pending:
        yield finish()


SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DENSE_FILE_BYTES = 256 * 2**20  # the non-expert weights are written in files of about this size


def make_pack(
    path: Path, source: PackSource, folder: Path, recipe: Recipe, device: torch.device
) -> None:
    """Write the pack `path` of `source`, whose `folder` (or GGUF file) has more than weights.

    Weights are quantised on `device`. Continues where an interrupted run stopped, and returns at
    once when the pack exists. Holds at most the weights of two experts, one record, and two chunks
    for each process. Raises `PackError` when the disk is too small.
    """
    with PackWriter(path, source.describe(recipe)) as writer:
        if not writer.done:
            _write(writer, source, folder, device)
            writer.finish()


def _write(writer: PackWriter, source: PackSource, folder: Path, device: torch.device) -> None:
    beside = list(companions(folder))  # first, because these files may be unusable
    info, checkpoint = writer.info, source.checkpoint

    def read(dense: PackDense) -> Matrices:
        return {"weight": (checkpoint.read(checkpoint.plain[f"{dense.modules[0]}.weight"]), None)}

    layers: dict[int, list[Part]] = {
        index: [
            (info.layout_of(index), functools.partial(checkpoint.expert, module, expert))
            for expert in range(module.num_experts)
        ]
        for index, module in enumerate(source.experts)
        if not writer.has(PackLayer.file_name(index))
    }
    matrices: dict[tuple[PackDense, ...], list[Part]] = {
        members: [(info.dense_layout(dense), functools.partial(read, dense)) for dense in members]
        for file, group in itertools.groupby(info.dense, key=lambda dense: dense.file_name)
        if not writer.has(file) and (members := tuple(group))
    }
    layouts = [layout for parts in (*layers.values(), *matrices.values()) for layout, _ in parts]
    files = _dense_files(checkpoint, info)
    missing = [tensors for file, tensors in files.items() if not writer.has(file)]
    needed = sum(layout.record_bytes for layout in layouts)
    needed += sum(nbytes for tensors in missing for _, nbytes in tensors)
    check_room(writer.path, needed)
    weights = sum(layout.weights for layout in layouts)
    quantises = any(matrix.group_size for layout in layouts for matrix in layout.matrices)
    verb = "quantising" if quantises else "packing"
    with (
        Progress(f"{verb} {info.source}", total=weights, unit="weights") as progress,
        make_encoder(weights if quantises else 0, device) as encoder,
    ):
        for index, parts in layers.items():
            writer.write_layer(index, encode_in_turn(parts, encoder, progress))
        for members, parts in matrices.items():
            records = encode_in_turn(parts, encoder, progress)
            tensors = [
                (dense.modules[0], "U8", (len(record),), record.clone())
                for dense, record in zip(members, records, strict=True)
            ]
            writer.write_tensors(members[0].file_name, tensors)
    _write_dense(writer, checkpoint, files)
    for name, data in beside:
        writer.write_file(name, data)


def check_room(path: Path, needed: int, what: str = "the pack") -> None:
    """Raise `PackError` unless `needed` bytes are free where `path` is, or is going to be."""
    place = next(each for each in (path, *path.parents) if each.is_dir())
    if needed > (free := shutil.disk_usage(place).free):
        raise PackError(
            f"{what} needs {gib(needed)} and {place} has {gib(free)} free: free some space, or "
            f"choose {ELSEWHERE}"
        )


def _dense_files(checkpoint: Checkpoint, info: PackInfo) -> dict[str, list[tuple[str, int]]]:
    """For each file of tensors that are kept as stored, their names and sizes in bytes."""
    quantised = {f"{module}.weight" for dense in info.dense for module in dense.modules}
    files: list[list[tuple[str, int]]] = [[]]
    for name, nbytes in checkpoint.dense(quantised):
        if sum(size for _, size in files[-1]) >= DENSE_FILE_BYTES:
            files.append([])
        files[-1].append((name, nbytes))
    return {f"model-{n:05d}.safetensors": tensors for n, tensors in enumerate(files, start=1)}


def _write_dense(
    writer: PackWriter, checkpoint: Checkpoint, files: dict[str, list[tuple[str, int]]]
) -> None:
    """Write `files` and their index, as any loader of sharded checkpoints reads them."""
    weight_map: dict[str, str] = {}
    for file, tensors in files.items():
        weight_map.update((name, file) for name, _ in tensors)
        if not writer.has(file):
            loaded = [_as_bytes(name, checkpoint.read(name)) for name, _ in tensors]
            writer.write_tensors(file, loaded)
    index = {"metadata": {}, "weight_map": weight_map}
    writer.write_file(INDEX, json.dumps(index, indent=1).encode())


def _as_bytes(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], Tensor]:
    kind = SAFETENSORS_NAMES[tensor.dtype]
    return name, kind, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8)
