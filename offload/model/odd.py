"""Tells what a folder is that looks like a checkpoint and cannot be read as one; without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError, SourceError
from offload.files import read_object

DEQUANTISED = ("fp8", "mxfp4")  # the quantisation methods whose weights can be read
PACKED = "moe-offload"  # the method that the config of a pack names
POINTER = b"version https://git-lfs"  # what the file of Git LFS begins with that stands for another
UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2", ".cache/**/*.incomplete")
# A file that a folder without a config has, and what such a folder is.
FOREIGN = {
    "model_index.json": "a pipeline of diffusers, which makes images",
    "params.json": "a model in the own format of Meta or Mistral",
    "tf_model.h5": "a TensorFlow checkpoint",
    "flax_model.msgpack": "a Flax checkpoint",
    "*.onnx": "an ONNX model",
    "*.mlpackage": "a Core ML model",
}


def check_folder(folder: Path) -> None:
    """Raise `SourceError` or `CheckpointError` if `folder` is of a kind that is not read."""
    pointers = sorted(file.name for file in folder.glob("*") if _is_pointer(file))
    if pointers:
        named = ", ".join(pointers[:2]) + (f" and {len(pointers) - 2} more" * (len(pointers) > 2))
        raise CheckpointError(
            f"{folder} has Git-LFS pointers where files should be ({named}): run git lfs pull in it"
        )
    has_config = (folder / "config.json").is_file()
    if (folder / "adapter_config.json").is_file() and not _has_weights(folder):
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise SourceError(
            f"{folder} is a LoRA adapter, not a model: merge it into its base model ({base}) with "
            "merge_and_unload of peft, save the result with save_pretrained, and name that folder"
        )
    if not has_config:
        _check_without_config(folder)
    elif not _has_weights(folder):
        unfinished = [file.name for pattern in UNFINISHED for file in folder.glob(pattern)]
        if unfinished:
            raise CheckpointError(
                f"{folder} was not downloaded to its end ({unfinished[0]}): continue the download"
            )


def _is_pointer(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > 1024:
            return False
        with file.open("rb") as handle:
            return handle.read(len(POINTER)) == POINTER
    except OSError:  # whoever reads the file reports it
        return False


def _has_weights(folder: Path) -> bool:
    files = (file.name for file in folder.glob("*.safetensors"))
    return any(not name.startswith("adapter_") for name in files)


def _check_without_config(folder: Path) -> None:
    cached = folder.name.removeprefix("models--")
    if cached != folder.name and (folder / "snapshots").is_dir():
        raise SourceError(
            f"{folder} is the hub's cache of a model: name the model, {cached.replace('--', '/')}"
        )
    for pattern, what in FOREIGN.items():
        if any(folder.glob(pattern)):
            raise SourceError(
                f"{folder} is {what}: use the model's safetensors checkpoint for transformers, "
                "which has a config.json"
            )
    inner = sorted(file.parent for file in folder.glob("*/config.json"))
    if inner and not any(folder.glob("*.gguf")):
        raise SourceError(
            f"{folder} has no config.json, but folders in it have one: name one of them, like "
            f"{inner[-1]}"
        )


def quantisations(config: dict[str, Any]) -> Iterator[Any]:
    """What a config and its text part say about quantisation."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (given := part.get("quantization_config")):
            yield given


def check_quantisation(source: str, config: dict[str, Any]) -> None:
    """Raise `SourceError` if weights with this config are stored in a way that is not read."""
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx:
        raise SourceError(
            f"{source} is quantised to {mlx.get('bits')} bits for MLX, which is not read: use the "
            "checkpoint that it was made from"
        )
    for given in quantisations(config):
        method = given.get("quant_method") if isinstance(given, dict) else given
        if method not in (*DEQUANTISED, PACKED) and not is_compressed_float8(given):
            if isinstance(given, dict) and given.get("format"):
                method = f"{method}, {given['format']}"
            raise SourceError(
                f"{source} is already quantised ({method}), which is not read: use the checkpoint "
                "in bfloat16, float16, float32, fp8 or mxfp4, or a GGUF file"
            )


def is_compressed_float8(given: Any) -> bool:
    """Whether a `quantization_config` is that of compressed-tensors for float8 weights with scales,
    which are stored as those of the method fp8 are."""
    if not isinstance(given, dict) or given.get("quant_method") != "compressed-tensors":
        return False
    weights = list(compressed_weights(given))
    sparse = given.get("sparsity_config") or {}
    return (
        given.get("format") in ("float-quantized", "naive-quantized")
        and bool(weights)
        and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)
        and not given.get("transform_config")
        and isinstance(sparse, dict)
        and sparse.get("format", "dense") == "dense"
    )


def compressed_weights(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What compressed-tensors says of the weights of each group of modules."""
    groups = given.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict):
            yield weights
