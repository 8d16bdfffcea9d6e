"""Opens the config, generation config and weights of a model that was found."""

import logging
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
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
from offload.model.odd import check_quantisation, compressed_weights, quantisations
from offload.sampling import is_number, resolve_sampling

logger = logging.getLogger("offload")


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
                "folder): read it, then pass --trust-remote-code if you "
                "trust it"
            )
    check_quantisation(source, raw)
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
            raise CheckpointError(f"{path} mixes float8 and MXFP4, which is not supported")
        return Fp8Source(plain, _block_size(path))
    return Mxfp4Source(plain) if packed else plain


def _block_size(folder: Path) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None when the checkpoint's config does not say."""
    file = folder / "config.json"
    for given in quantisations(read_object(file)):
        if not isinstance(given, dict):
            continue
        blocks = [w for w in compressed_weights(given) if w.get("strategy") == "block"]
        sizes = [given.get("weight_block_size"), *(each.get("block_structure") for each in blocks)]
        match next((size for size in sizes if size is not None), None):
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
ONE_ID = ("bos_token_id", "pad_token_id")
DEEPEST = 16  # levels of lists in lists; transformers copies the values recursively


def check_generation_config(folder: Path, *, tell: bool = False) -> GenerationConfig | None:
    """The generation config in `folder`, or None if there is none.

    Some tools write a top_k of -1 for "off", and ids as text or in lists of lists. Both are read as
    they are meant; with `tell`, the log says so. Raises `CheckpointError` for what transformers
    cannot use: it would fail in the middle of loading, or when the first token is chosen.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    values = read_object(file)
    try:
        meant = _as_meant(values)
        _check_types(meant)
        config = GenerationConfig.from_dict(meant)
        resolve_sampling(config)
    except Exception as error:  # whatever transformers raises on what is in the file
        raise CheckpointError(
            f"{file} cannot be used: {reason(error)}: correct it, fetch it again, or remove it"
        ) from None
    if tell:
        for name in (name for name in ("top_k", "eos_token_id", *ONE_ID) if name in values):
            if meant[name] != values[name]:
                text = "%s: %s is %r and is read as %r"
                logger.warning(text, file, name, values[name], meant[name])
    return config


def _as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with a top_k of -1 as 0, and with ids as whole numbers or one list of them."""
    if _depth(values) > DEEPEST:
        raise GenerationError(f"its values are nested more than {DEEPEST} deep")
    ids = {name: _ids(values[name]) for name in ("eos_token_id", *ONE_ID) if name in values}
    for name in ONE_ID:
        if isinstance(ids.get(name), list) and len(ids[name]) == 1:
            ids[name] = ids[name][0]
    return {**values, **ids, **({"top_k": 0} if values.get("top_k") == -1 else {})}


def _ids(value: Any) -> Any:
    if isinstance(value, list):
        parts = [_ids(item) for item in value]
        return [id for part in parts for id in (part if isinstance(part, list) else [part])]
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value


def _check_types(values: dict[str, Any]) -> None:
    """Raise `GenerationError` for a value whose type transformers does not check."""
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
