"""From a checkpoint to a pack, a layer at a time.

Knows: the order of the work and how much is left. Does not know: how weights become bytes
(`quant.record`) nor how they reach the disk safely (`quant.pack_writer`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.checkpoint import DTYPES, Checkpoint, SafetensorsSource
from offload.errors import PackError, UnsupportedModelError
from offload.progress import Progress
from offload.skeleton import ExpertsModule
from quant.pack import PackInfo, PackLayer
from quant.pack_writer import PackWriter
from quant.record import STORED_DTYPES, MatrixSpec, RecordLayout, encode_record, plan_layout
from quant.scheme import Scheme

SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DENSE_FILE_BYTES = 256 * 2**20  # the non-expert weights are written in files of about this size
INDEX = "model.safetensors.index.json"
COPIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.py",
)  # config, tokenizer, template, remote code


@dataclass(frozen=True)
class Recipe:
    """How a pack is to be made."""

    expert_bits: int = 4
    dense_bits: int = 16
    group_size: int = 64

    @classmethod
    def asked(
        cls, expert_bits: int | None, dense_bits: int | None, group_size: int | None
    ) -> Recipe:
        """The recipe with the defaults where None was given."""
        given = {"expert_bits": expert_bits, "dense_bits": dense_bits, "group_size": group_size}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def __post_init__(self) -> None:
        if self.expert_bits not in (4, 8, 16):
            raise UnsupportedModelError(f"expert_bits must be 4, 8 or 16, not {self.expert_bits}")
        if self.dense_bits != 16:
            raise UnsupportedModelError(f"dense_bits must be 16 for now, not {self.dense_bits}")
        if self.group_size not in (16, 32, 64, 128, 256):
            raise UnsupportedModelError(
                f"group_size must be 16, 32, 64, 128 or 256, not {self.group_size}"
            )


@dataclass(frozen=True)
class PackSource:
    """What a pack is made from."""

    name: str  # for people
    fingerprint: str  # changes when the weights do
    folder: Path  # of the checkpoint


def describe(
    source: PackSource, checkpoint: Checkpoint, experts: list[ExpertsModule], recipe: Recipe
) -> PackInfo:
    """Everything about the pack that is known before a weight is read."""
    layouts: list[RecordLayout] = []
    layers = []
    for module in experts:
        specs = tuple(_as_stored(checkpoint, module, spec) for spec in module.matrices)
        layout = plan_layout(specs, Scheme(recipe.expert_bits, recipe.group_size))
        if layout not in layouts:
            layouts.append(layout)
        layers.append(PackLayer(module.path, module.num_experts, layouts.index(layout)))
    return PackInfo(
        source.name,
        source.fingerprint,
        recipe.expert_bits,
        recipe.dense_bits,
        recipe.group_size,
        checkpoint.dense_parameters(),
        tuple(layouts),
        tuple(layers),
    )


def _as_stored(checkpoint: Checkpoint, module: ExpertsModule, spec: MatrixSpec) -> MatrixSpec:
    name = f"{module.path}.{spec.name}"
    dtype = checkpoint.stored_dtype(name)
    bias_dtype = checkpoint.stored_dtype(f"{name}_bias") if spec.has_bias else dtype
    for stored in (dtype, bias_dtype):
        if stored not in STORED_DTYPES.values():
            raise UnsupportedModelError(
                f"the experts are stored as {str(stored).removeprefix('torch.')}, which is not "
                "read yet: use a checkpoint in bfloat16, float16 or float32"
            )
    return replace(spec, dtype=dtype, bias_dtype=bias_dtype)


def make_pack(
    path: Path,
    source: PackSource,
    model: PreTrainedModel,
    experts: list[ExpertsModule],
    recipe: Recipe,
    check: Callable[[PackInfo], object],
) -> None:
    """Write the pack `path` from `source`; `model` is on meta with its experts.

    Goes on where an interrupted run stopped, and returns at once when the pack is there. Holds one
    expert's weights and one layer's records at most. Raises `PackError` when the disk is too small.
    """
    checkpoint = Checkpoint(SafetensorsSource(source.folder), model, experts)
    info = describe(source, checkpoint, experts, recipe)
    check(info)
    with PackWriter(path, info) as writer:
        if writer.done:
            return
        todo = [i for i in range(len(info.layers)) if not writer.has(PackLayer.file_name(i))]
        layer_bytes = [
            n.num_experts * info.layout_of(i).record_bytes for i, n in enumerate(info.layers)
        ]
        _check_space(path, sum(layer_bytes[i] for i in todo) + checkpoint.dense_bytes())
        weights = {i: info.layers[i].num_experts * _expert_weights(info.layout_of(i)) for i in todo}
        verb = "quantising" if recipe.expert_bits < 16 else "packing"
        with Progress(
            f"{verb} {source.name}", total=sum(weights.values()), unit="weights"
        ) as progress:
            for layer in todo:
                records = _records(checkpoint, experts[layer], info.layout_of(layer), progress)
                writer.write_layer(layer, records)
        _write_dense(writer, checkpoint)
        for pattern in COPIED:
            for file in sorted(source.folder.glob(pattern)):
                if file.name != INDEX:
                    writer.write_file(file.name, file.read_bytes())
        writer.finish()


def _expert_weights(layout: RecordLayout) -> int:
    return sum(matrix.rows * matrix.columns for matrix in layout.matrices)


def _records(
    checkpoint: Checkpoint, module: ExpertsModule, layout: RecordLayout, progress: Progress
) -> Iterator[Tensor]:
    record = torch.empty(layout.record_bytes, dtype=torch.uint8)
    for expert in range(module.num_experts):
        encode_record(record, layout, checkpoint.expert(module, expert))
        progress.advance(_expert_weights(layout))
        yield record


def _write_dense(writer: PackWriter, checkpoint: Checkpoint) -> None:
    """The tensors that are not experts, in files a loader of sharded checkpoints reads."""
    batch: list[tuple[str, Tensor]] = []
    weight_map: dict[str, str] = {}
    size = number = 0

    def flush() -> None:
        nonlocal batch, size, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        writer.write_tensors(file, [_as_bytes(name, tensor) for name, tensor in batch])
        weight_map.update({name: file for name, _ in batch})
        batch, size = [], 0

    for name, tensor in checkpoint.dense():
        batch.append((name, tensor))
        size += tensor.nbytes
        if size >= DENSE_FILE_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    writer.write_file(INDEX, json.dumps(index, indent=1).encode())


def _as_bytes(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], Tensor]:
    kind = SAFETENSORS_NAMES[tensor.dtype]
    return name, kind, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise PackError(
            f"the pack needs {needed / 2**30:.1f} GiB and {path.parent} has {free / 2**30:.1f} GiB "
            "free: free some space, or choose another place with --pack-dir or OFFLOAD_HOME"
        )


def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint that changes when its weights do, without reading all of them.

    Covers config.json, each weight file's size, time of change and header, and 64 samples of 4 KiB
    spread over it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in SafetensorsSource(folder).files:
        file = folder / name
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        digest.update(f"{name} {size} {changed}".encode())
        with file.open("rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(header))
            for start in range(8 + header, size, max(4096, math.ceil((size - header) / 64))):
                handle.seek(start)
                digest.update(handle.read(4096))
    return digest.hexdigest()
