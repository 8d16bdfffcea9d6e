"""Small packs of made-up bytes, for tests in which a record's meaning does not matter."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.pack.shelf import ORIGIN
from offload.quant.pack import PackInfo, PackLayer
from offload.quant.pack_writer import PackWriter
from offload.quant.record import MatrixSpec, plan_layout
from offload.quant.scheme import Scheme

DENSE = "model-00001.safetensors"
CONFIG = "config.json"

# Forked children start at once because everything is imported already.
HAS_FORK = "fork" in multiprocessing.get_all_start_methods()
FORK = multiprocessing.get_context("fork" if HAS_FORK else None)
needs_fork = pytest.mark.skipif(not HAS_FORK, reason="starts processes by fork")


def make_info(layers: int = 3, experts: int = 4, *, group_size: int = 16) -> PackInfo:
    """Layers of two alternating kinds, of which the second has one expert more."""
    small = plan_layout(
        (MatrixSpec("up_proj", 8, 16, False, torch.bfloat16),), Scheme(4, group_size)
    )
    large = plan_layout(
        (MatrixSpec("down_proj", 8, 32, True, torch.bfloat16),), Scheme(8, group_size)
    )
    return PackInfo(
        source="someone/model",
        fingerprint="f" * 64,
        bits=f"experts=4g{group_size}",
        dense_parameters=8,
        layouts=(small, large),
        layers=tuple(
            PackLayer(f"model.layers.{i}.mlp.experts", experts + i % 2, i % 2)
            for i in range(layers)
        ),
    )


def record_of(info: PackInfo, layer: int, expert: int) -> Tensor:
    seed = torch.Generator().manual_seed(1000 * layer + expert)
    size = info.layout_of(layer).record_bytes
    return torch.randint(0, 256, (size,), generator=seed, dtype=torch.uint8)


def records(info: PackInfo, layer: int, pause_seconds: float = 0.0) -> Iterator[Tensor]:
    """Yield the layer's records, each in the same buffer, as a quantiser does."""
    buffer = torch.empty(info.layout_of(layer).record_bytes, dtype=torch.uint8)
    for expert in range(info.layers[layer].num_experts):
        time.sleep(pause_seconds)
        buffer.copy_(record_of(info, layer, expert))
        yield buffer


def write_pack(
    path: Path,
    info: PackInfo,
    *,
    pause_seconds: float = 0.0,
    started: Callable[[], None] = lambda: None,
) -> list[int]:
    """Make the pack or go on with it; return the layers that were left to write."""
    with PackWriter(path, info) as writer:
        started()
        if writer.done:
            return []
        every = range(len(info.layers))
        todo = [layer for layer in every if not writer.has(PackLayer.file_name(layer))]
        for layer in todo:
            writer.write_layer(layer, records(info, layer, pause_seconds))
        values = torch.arange(8, dtype=torch.float32)
        tensors = (
            ("embed.weight", "F32", (2, 3), values[:6].view(torch.uint8)),
            ("norm.weight", "F32", (2,), values[6:].view(torch.uint8)),
        )
        writer.write_tensors(DENSE, tensors)
        time.sleep(pause_seconds)
        writer.write_file(CONFIG, b'{"model_type": "made up"}')
        writer.finish()
    return todo


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a pack by name, without the notes that are written beside it."""
    files = (file for file in sorted(folder.iterdir()) if ORIGIN not in file.name)
    return {file.name: file.read_bytes() for file in files}
