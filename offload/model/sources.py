"""Opens the config, generation config and weights of a model that was found."""

import importlib.util
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload.errors import CheckpointError, GenerationError, SourceError
from offload.files import read_object
from offload.lines import reason
from offload.model.checkpoint import TensorSource
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_config import gguf_config
from offload.model.formats.gguf_model import GgufSource
from offload.model.formats.safetensors import SafetensorsSource
from offload.model.formats.scaled import BLOCKS, FLOAT8, Fp8Source, Mxfp4Source
from offload.model.layout import is_gguf
from offload.sampling import is_number, resolve_sampling

DEQUANTISED = ("fp8", "mxfp4")  # the quantisation methods whose weights can be read
PACKED = "moe-offload"  # the method that the config of a pack names


def read_config(source: str, folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of the checkpoint, GGUF file or pack `folder`, without `quantization_config`.

    `source` is its name in messages. Raises `SourceError` or `CheckpointError`.
    """
    if is_gguf(folder):
        return gguf_config(folder)
    file = folder / "config.json"
    raw = read_object(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file} has no model_type: fetch it again")
    if kind not in CONFIG_MAPPING:
        given = raw.get("auto_map")
        remote = given.get("AutoConfig") if isinstance(given, dict) else None
        if not remote or not isinstance(remote, str):
            raise SourceError(f"{source}: transformers does not know {kind!r}: try a newer one")
        if not trust_remote_code:
            raise SourceError(
                f"{source} wants to run its own code ({remote.partition('.')[0]}.py in its "
                "folder): read it, then pass --trust-remote-code (trust_remote_code=True) if you "
                "trust it"
            )
    for given in _quantisations(raw):
        method = given.get("quant_method") if isinstance(given, dict) else given
        if method not in (*DEQUANTISED, PACKED):
            raise SourceError(
                f"{source} is already quantised ({method}), which is not read: use the checkpoint "
                "in bfloat16, float16, float32, fp8 or mxfp4, or a GGUF file"
            )
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        for part in (config, config.get_text_config()):
            for name in ("quantization_config", "transformers_weights"):
                vars(part).pop(name, None)  # weights are dequantised when they are read
    except Exception as error:  # whatever a config class raises on what is in the file
        raise CheckpointError(
            f"{file} is not a usable config ({reason(error)}): fetch it again"
        ) from None
    return config


def _quantisations(config: dict[str, Any]) -> list[Any]:
    """What a config and its text part say about quantisation."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return [given for part in parts if (given := part.get("quantization_config"))]


def open_weights(path: Path, model: PreTrainedModel) -> TensorSource:
    """The tensors of `path`, a checkpoint folder or .gguf file, for the parameters of `model`.

    Raises `CheckpointError`.
    """
    if is_gguf(path):
        return GgufSource(GgufFile(path), model)
    plain = SafetensorsSource(path)
    names = plain.names()
    packed = any(name.endswith(BLOCKS) for name in names)
    if any(plain.stored_dtype(name) in FLOAT8 for name in names):
        if packed:
            raise CheckpointError(f"{path} mixes float8 and MXFP4, which is not read")
        return Fp8Source(plain, _block_size(path))
    return Mxfp4Source(plain) if packed else plain


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")


def load_tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None if it has none. Raises `CheckpointError`."""
    if not any((path / name).is_file() for name in TOKENIZERS) and not any(path.glob("*.tiktoken")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a tokenizer class may raise anything when its files are wrong
        remedy = "fetch it again, or pass --trust-remote-code if it brings code that you trust"
        if lacking := _lacking(path, error):
            remedy = f"pip install {' '.join(lacking)}"
        raise CheckpointError(
            f"the tokenizer in {path} cannot be used ({reason(error)}): {remedy}"
        ) from None


def _lacking(path: Path, error: Exception) -> list[str]:
    """Packages that a tokenizer needs and that are not installed."""
    needed = re.findall(r"not found in your environment: ([\w, -]+?)\. Run", str(error))
    packages = [name.strip() for names in needed for name in names.split(",")]
    whole, model = path / "tokenizer.json", path / "tokenizer.model"
    if not whole.is_file() and model.is_file():
        with model.open("rb") as file:  # a SentencePiece model begins with a tag of protobuf
            packages += ["sentencepiece", "protobuf"] if file.read(1) == b"\n" else ["tiktoken"]
    elif not whole.is_file() and any(path.glob("*.tiktoken")):
        packages.append("tiktoken")
    modules = {"protobuf": "google.protobuf"}
    return [name for name in dict.fromkeys(packages) if not _importable(modules.get(name, name))]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.replace("-", "_")) is not None
    except ModuleNotFoundError:  # not even the package around it is there
        return False


def _block_size(folder: Path) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None when the checkpoint's config does not say."""
    file = folder / "config.json"
    for given in _quantisations(read_object(file)):
        match given.get("weight_block_size") if isinstance(given, dict) else None:
            case None:
                continue
            case [int(rows), int(columns)] if rows >= 1 and columns >= 1:
                return rows, columns
            case size:
                raise CheckpointError(
                    f"{file} has weight_block_size {size!r}, which is not two sizes: fetch it again"
                )
    return None


NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
WHOLE_NUMBERS = ("top_k", "max_new_tokens", "bos_token_id", "pad_token_id")
DEEPEST = 16  # levels of lists in lists; transformers copies the values recursively


def check_generation_config(folder: Path) -> None:
    """Raise `CheckpointError` when the file in `folder` is there and transformers cannot use it.

    transformers would otherwise fail in the middle of loading, or when the first token is chosen.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    values = read_object(file)
    try:
        _check_types(values)
        resolve_sampling(GenerationConfig.from_dict(values))
    except Exception as error:  # whatever transformers raises on what is in the file
        raise CheckpointError(
            f"{file} cannot be used: {reason(error)}: correct it, fetch it again, or remove it"
        ) from None


def _check_types(values: dict[str, Any]) -> None:
    """Raise `GenerationError` for a value whose type transformers does not check."""
    if _depth(values) > DEEPEST:
        raise GenerationError(f"its values are nested more than {DEEPEST} deep")
    for name in values:
        if callable(getattr(GenerationConfig, name, None)):
            raise GenerationError(f"{name} is not a parameter")
    for names, kind, what in ((NUMBERS, Real, "number"), (WHOLE_NUMBERS, Integral, "whole number")):
        for name in names:
            value = values.get(name)
            if value is not None and not is_number(value, kind):
                raise GenerationError(f"{name} is {value!r}: it must be a {what}")
    end_ids(values.get("eos_token_id"))


def _depth(value: Any) -> int:
    """How many objects and lists lie inside each other."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def end_ids(value: Any) -> frozenset[int]:
    """The ids of an `eos_token_id`: none, one or several. Raises `GenerationError`."""
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list | tuple | set | frozenset) else [value]
    if not all(is_number(item, Integral) for item in ids):
        raise GenerationError(f"eos_token_id is {value!r}: it must be a whole number, or several")
    return frozenset(int(item) for item in ids)
