"""How much is left to encode, and doing it: reading, encoding and writing at the same time.

Knows: the order in which matrices go through an encoder. Does not know: checkpoints, files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from offload.progress import Progress
from offload.quant.encode import DeviceEncoder, Encoder, HereEncoder
from offload.quant.pack import PackDense, PackInfo, PackLayer
from offload.quant.pending import PendingRecord
from offload.quant.record import RecordLayout
from offload.quant.workers import WorkerEncoder

Matrices = Mapping[str, tuple[Tensor, Tensor | None]]  # what `quant.record.PendingRecord` takes
Read = Callable[[], Matrices]
WORTH_PROCESSES = 2**26  # weights: below it a process is done before it has started
PROCESS_BYTES = 2**30  # of RAM for each process; it takes a third of that, mostly torch itself
CHUNKS_AHEAD = 2  # for each process: one being encoded, one waiting for it


@dataclass(frozen=True)
class Work:
    """What an interrupted or new run still has to encode."""

    layers: tuple[int, ...]
    dense_files: tuple[tuple[PackDense, ...], ...]
    weights: int
    nbytes: int
    quantises: bool

    @classmethod
    def left(cls, info: PackInfo, has: Callable[[str], bool]) -> Work:
        """All of `info` but the files that `has` says are there."""
        layers = [i for i in range(len(info.layers)) if not has(PackLayer.file_name(i))]
        grouped = itertools.groupby(info.dense, key=lambda dense: dense.file_name)
        dense = [tuple(members) for name, members in grouped if not has(name)]
        parts = [(info.layout_of(i), info.layers[i].num_experts) for i in layers]
        parts += [(info.dense_layout(member), 1) for members in dense for member in members]
        return cls(
            tuple(layers),
            tuple(dense),
            sum(layout.weights * count for layout, count in parts),
            sum(layout.record_bytes * count for layout, count in parts),
            any(matrix.group_size for layout, _ in parts for matrix in layout.matrices),
        )


@contextlib.contextmanager
def make_encoder(weights: int, device: torch.device) -> Iterator[Encoder]:
    """An encoder for so many weights: the GPU, or a process for each core if that is worth it."""
    if device.type != "cpu":
        with contextlib.closing(DeviceEncoder(device)) as gpu:
            yield gpu
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, psutil.virtual_memory().available // PROCESS_BYTES)
    if weights < WORTH_PROCESSES or count < 2:
        yield HereEncoder()
        return
    with WorkerEncoder(count) as encoder:
        yield encoder


def encode_in_turn(
    parts: Iterable[tuple[RecordLayout, Read]],
    encoder: Encoder,
    progress: Progress,
) -> Iterator[Tensor]:
    """The record [record_bytes] uint8 of each part, in order; valid until the next one.

    Parts are read ahead, two at least, while there is too little to do for the encoder's width.
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
