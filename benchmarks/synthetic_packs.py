"""Packs of random weights, made in packed form on the spot: nothing is quantised or downloaded.

Knows: how a pack lies on disk, and which scales keep activations finite. Does not know: what the
pack is for. The layers' files are hard links to one file, a layer's records a few random ones in
turn, and a checksum is computed once for each of them: 25 GB take seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from offload.model.seam import ExpertsModule, build_on_meta, find_experts, model_class, own_config
from offload.pack.recipe import Recipe
from offload.quant.codes import encode_scales
from offload.quant.manifest import MANIFEST, file_sha256, manifest_check
from offload.quant.pack import PackInfo, PackLayer, as_buffer, safetensors_header
from offload.quant.record import MatrixSpec, MatrixView, RecordLayout, plan_layout, view_record
from offload.quant.scheme import Scheme

DISTINCT = 3  # random records of a layer; the others are the same ones again
FILE_BYTES = 2**30  # of dense weights, about
BLOCK_WEIGHTS = 2**22  # random values that every dense weight is cut from
DENSE_STD, BIAS_STD = 0.02, 0.02


def write_synthetic_pack(
    path: Path, config: PreTrainedConfig, scheme: Scheme, *, seed: int = 0, offsets: bool = True
) -> PackInfo:
    """Write a pack of a model like `config`, experts stored by `scheme`, the rest in bfloat16.

    Without `offsets`, groups have scales alone. It has no tokenizer and no token that ends a text.
    """
    config.dtype = torch.bfloat16
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    cls = model_class(config, str(path), False)
    model = build_on_meta(own_config(config, cls), cls)
    experts = find_experts(model)
    info = _describe(config, model, experts, scheme)
    path.mkdir(parents=True)
    config.save_pretrained(path)
    random = torch.Generator().manual_seed(seed)
    sums = dict(_write_layers(path, info, random, offsets))
    sums |= _write_dense(path, model, experts, random)
    for file in path.iterdir():
        if file.name not in sums:
            sums[file.name] = file_sha256(file)
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(sums.items())
    }
    manifest = json.loads(json.dumps({**info.to_json(), "files": files}))
    manifest["check"] = manifest_check(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return info


def pack_bytes(config: PreTrainedConfig, scheme: Scheme) -> tuple[int, int, int]:
    """Bytes of one layer's records, of one record, and of the rest of a model like `config`."""
    config.dtype = torch.bfloat16
    cls = model_class(config, "a synthetic pack", False)
    model = build_on_meta(own_config(config, cls), cls)
    info = _describe(config, model, find_experts(model), scheme)
    record_bytes = info.slot_bytes
    return info.layers[0].num_experts * record_bytes, record_bytes, info.dense_bytes(2)


def first_layer(config: PreTrainedConfig, scheme: Scheme) -> tuple[torch.nn.Module, RecordLayout]:
    """The experts module (on meta) and the record's layout of such a model's first MoE layer."""
    config.dtype = torch.bfloat16
    cls = model_class(config, "a synthetic pack", False)
    model = build_on_meta(own_config(config, cls), cls)
    info = _describe(config, model, find_experts(model), scheme)
    return model.get_submodule(info.layers[0].module), info.layout_of(0)


def _describe(
    config: PreTrainedConfig,
    model: PreTrainedModel,
    experts: list[ExpertsModule],
    scheme: Scheme,
) -> PackInfo:
    layouts: list[RecordLayout] = []
    layers = []
    for module in experts:
        specs = tuple(
            MatrixSpec(m.name, m.rows, m.columns, m.has_bias, torch.bfloat16)
            for m in module.matrices
        )
        layout = plan_layout(specs, scheme)
        if layout not in layouts:
            layouts.append(layout)
        layers.append(PackLayer(module.path, module.num_experts, layouts.index(layout)))
    return PackInfo(
        source=f"synthetic {config.model_type}",
        fingerprint="synthetic",
        bits=str(Recipe().with_rules(f"experts={scheme}")),
        dense_parameters=sum(tensor.numel() for _, tensor in _dense(model, experts)),
        layouts=tuple(layouts),
        layers=tuple(layers),
    )


def _write_layers(
    path: Path, info: PackInfo, random: torch.Generator, offsets: bool
) -> Iterator[tuple[str, str]]:
    """Each file's name and checksum; layers that are alike share one file."""
    written: dict[tuple[int, int], tuple[Path, str]] = {}
    for index, layer in enumerate(info.layers):
        file = path / PackLayer.file_name(index)
        alike = (layer.layout, layer.num_experts)
        if alike in written:
            _link(written[alike][0], file)
        else:
            digest = _write_layer(file, layer.num_experts, info.layout_of(index), random, offsets)
            written[alike] = file, digest
        yield file.name, written[alike][1]


def _write_layer(
    file: Path, experts: int, layout: RecordLayout, random: torch.Generator, offsets: bool
) -> str:
    """Write `experts` records and return the file's checksum."""
    records = [random_record(layout, random, offsets) for _ in range(min(DISTINCT, experts))]
    checksums = [zlib.crc32(as_buffer(record)) for record in records]
    size = experts * layout.record_bytes
    parts = {
        "records": ("U8", (experts, layout.record_bytes), size),
        "crc32": ("I64", (experts,), 8 * experts),
    }

    def chunks() -> Iterator[bytes | memoryview]:
        yield from map(as_buffer, islice(cycle(records), experts))
        yield struct.pack(f"<{experts}q", *islice(cycle(checksums), experts))

    return _write_tensors(file, parts, chunks())


def _write_tensors(
    file: Path,
    parts: dict[str, tuple[str, tuple[int, ...], int]],
    chunks: Iterable[bytes | memoryview],
) -> str:
    """Write a safetensors file of `parts`, name -> dtype, shape and bytes; returns its checksum."""
    begin = safetensors_header((name, *part) for name, part in parts.items())
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for chunk in chain([begin], chunks):
            out.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def _link(source: Path, file: Path) -> None:
    try:
        os.link(source, file)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, file)


def random_record(layout: RecordLayout, random: torch.Generator, offsets: bool = True) -> Tensor:
    """A record [record_bytes] uint8 whose matrices keep a state's size: codes are uniform, and
    scales make of them weights with a deviation of 1 / sqrt(columns)."""
    words = torch.empty(-(-layout.record_bytes // 8), dtype=torch.int64)
    words.random_(generator=random)  # 63 bits of 64
    record = words.view(torch.uint8)[: layout.record_bytes]
    for view in view_record(record, layout).values():
        _set_values(view, random, offsets)
    return record


def _set_values(view: MatrixView, random: torch.Generator, offsets: bool) -> None:
    layout = view.layout
    std = layout.columns**-0.5
    if view.scales is None:
        view.weight.normal_(std=std, generator=random)
    else:
        step = std * 12**0.5 / 2**layout.bits  # of uniform codes: their deviation is 2^b / sqrt 12
        pairs = torch.rand(view.scales.shape, generator=random)
        pairs[..., 0].add_(0.5).mul_(step)
        pairs[..., 1].sub_(0.5).mul_(step * offsets)
        if view.steps is None:
            view.scales.copy_(pairs)
        else:
            for place, encoded in zip((view.scales, view.steps), encode_scales(pairs), strict=True):
                place.copy_(encoded)
    if view.bias is not None:
        view.bias.normal_(std=BIAS_STD, generator=random)


def _dense(model: PreTrainedModel, experts: list[ExpertsModule]) -> Iterator[tuple[str, Tensor]]:
    """The tensors outside the experts, those on meta that a checkpoint would have."""
    packed = {name for module in experts for name in module.parameters}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name not in packed and name not in tied:
            yield name, tensor


def _write_dense(
    path: Path, model: PreTrainedModel, experts: list[ExpertsModule], random: torch.Generator
) -> Iterator[tuple[str, str]]:
    """Each file's name and checksum."""
    values = torch.empty(BLOCK_WEIGHTS).normal_(std=DENSE_STD, generator=random).bfloat16()
    block = as_buffer(values.view(torch.uint8))
    files: list[dict[str, Tensor]] = [{}]
    for name, like in _dense(model, experts):
        if sum(2 * tensor.numel() for tensor in files[-1].values()) >= FILE_BYTES:
            files.append({})
        files[-1][name] = like
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file))
        parts = {
            name: ("BF16", tuple(like.shape), 2 * like.numel()) for name, like in tensors.items()
        }
        chunks = chain.from_iterable(
            _dense_values(name, like, block) for name, like in tensors.items()
        )
        yield file, _write_tensors(path / file, parts, chunks)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _dense_values(name: str, like: Tensor, block: memoryview) -> Iterator[bytes | memoryview]:
    """Norms pass on what they get, biases and sinks are zero, matrices are random."""
    size = 2 * like.numel()
    if like.dim() < 2:
        same = torch.full(like.shape, float("norm" in name), dtype=torch.bfloat16)
        yield as_buffer(same.view(-1).view(torch.uint8))
        return
    for start in range(0, size, len(block)):
        yield block[: size - start]
