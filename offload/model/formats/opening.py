"""Chooses the reader for a model's weights by their format."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from offload.errors import CheckpointError
from offload.files import read_object
from offload.model.formats import mxfp4
from offload.model.formats.fp8 import FLOAT8, Fp8Source
from offload.model.formats.gguf import GgufFile, gguf_files, is_gguf
from offload.model.formats.gguf_model import GgufSource
from offload.model.formats.mxfp4 import Mxfp4Source
from offload.model.formats.safetensors import SafetensorsSource, weight_files
from offload.model.formats.source import TensorSource


def open_weights(path: Path, model: PreTrainedModel) -> TensorSource:
    """The tensors of `path`, a checkpoint folder or .gguf file, for the parameters of `model`.

    Raises `CheckpointError`.
    """
    if is_gguf(path):
        return GgufSource(GgufFile(path), model)
    plain = SafetensorsSource(path)
    names = plain.names()
    packed = any(name.endswith(mxfp4.BLOCKS) for name in names)
    if any(plain.stored_dtype(name) in FLOAT8 for name in names):
        if packed:
            raise CheckpointError(f"{path} mixes float8 and MXFP4, which is not read")
        return Fp8Source(plain, _block_size(path))
    return Mxfp4Source(plain) if packed else plain


def files_of(path: Path) -> list[Path]:
    """The files that `open_weights` reads. Raises `CheckpointError`."""
    if is_gguf(path):
        return gguf_files(path)
    return [path / name for name in weight_files(path)]


def _block_size(folder: Path) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None when the checkpoint's config does not say."""
    config = read_object(folder / "config.json")
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        given = part.get("quantization_config")
        size = given.get("weight_block_size") if isinstance(given, dict) else None
        if size is not None:
            if (
                not isinstance(size, list)
                or len(size) != 2
                or any(type(n) is not int or n < 1 for n in size)
            ):
                raise CheckpointError(
                    f"{folder / 'config.json'} has weight_block_size {size!r}, which is not two "
                    "sizes: fetch it again"
                )
            return size[0], size[1]
    return None
