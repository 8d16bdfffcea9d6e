"""What a model's name stands for: a pack, a checkpoint folder, a hub id, or the demo.

Knows: folders, GGUF files, the hub's cache, what is refused and why. Does not know: what is inside
the weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from offload.errors import CheckpointError, GenerationError, SourceError
from offload.files import read_object, unreadable, user_path
from offload.lines import reason
from offload.model.formats import gguf_model as gguf_config
from offload.model.formats.gguf import GgufFile, gguf_files, is_gguf, model_name, models_in
from offload.model.formats.safetensors import INDEX
from offload.quant.pack import is_pack
from offload.sampling import is_number, resolve_sampling

CONFIG = "config.json"
QUANTISATION = "quantization_config"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def companions(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that belongs beside the weights of the model at `path`."""
    if is_gguf(path):
        yield from _of_gguf(path)
        return
    for pattern in COPIED:
        for file in sorted(path.glob(pattern)):
            if file.name == CONFIG:
                yield CONFIG, _plain_config(file)
            elif file.name != INDEX and file.is_file():
                yield file.name, _content(file)


def _plain_config(file: Path) -> bytes:
    """A config without word of quantisation, which a pack's dense weights no longer have."""
    config = read_object(file)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if not any(QUANTISATION in part for part in parts):
        return _content(file)
    for part in parts:
        part.pop(QUANTISATION, None)
    return json.dumps(config, indent=2).encode()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except PermissionError:
        raise unreadable(file) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from None


def _of_gguf(path: Path) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as scratch:
        gguf_config.read_config(path).save_pretrained(scratch)
        gguf_config.generation_config(path).save_pretrained(scratch)
        if "tokenizer.ggml.tokens" in GgufFile(path).fields:
            gguf_tokenizer(path).save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            yield file.name, file.read_bytes()


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, made by transformers. Raises `CheckpointError`."""
    first = gguf_files(path)[0]
    try:
        # transformers draws a bar of its own here, and there is no switch for it
        with contextlib.redirect_stderr(io.StringIO()):
            return AutoTokenizer.from_pretrained(
                first.parent, gguf_file=first.name, local_files_only=True
            )
    except Exception as error:  # whatever it raises on what is in the metadata
        raise CheckpointError(
            f"transformers cannot make the tokenizer in {first} ({reason(error)}): use the "
            "model's safetensors checkpoint"
        ) from None


NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
WHOLE_NUMBERS = ("top_k", "max_new_tokens", "bos_token_id", "pad_token_id")
DEEPEST = 16  # levels of lists in lists; transformers copies the values recursively


def check_generation_config(folder: Path) -> None:
    """Raise `CheckpointError` when the file in `folder` is there and cannot be used.

    It comes with the checkpoint, and transformers would fail in the middle of loading.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    remedy = "correct the file, fetch it again, or remove it"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {remedy}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no table of names and values: {remedy}")
    for fault in _faults(values):
        raise CheckpointError(f"{file}: {fault}: {remedy}")
    try:
        resolve_sampling(GenerationConfig.from_dict(values))
    except GenerationError as error:
        raise CheckpointError(f"{file}: {error}: {remedy}") from None
    except Exception as error:  # whatever transformers raises on what is in the file
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} is not usable ({reason}): {remedy}") from None


def end_ids(value: Any) -> frozenset[int]:
    """The ids of an `eos_token_id`: none, one or several. Raises `GenerationError`."""
    ids = value if isinstance(value, list | tuple | set | frozenset) else [value]
    if value is None:
        return frozenset()
    if not all(is_number(item, Integral) for item in ids):
        raise GenerationError(f"eos_token_id is {value!r}: it must be a whole number, or several")
    return frozenset(int(item) for item in ids)


def _faults(values: dict[str, Any]) -> Iterator[str]:
    if _depth(values) > DEEPEST:
        yield f"its values are nested more than {DEEPEST} deep"
    for name in values:
        if callable(getattr(GenerationConfig, name, None)):
            yield f"{name} is not a parameter"
    for names, kind, what in ((NUMBERS, Real, "number"), (WHOLE_NUMBERS, Integral, "whole number")):
        for name in names:
            value = values.get(name)
            if value is not None and not is_number(value, kind):
                yield f"{name} is {value!r}: it must be a {what}"
    try:
        end_ids(values.get("eos_token_id"))
    except GenerationError as error:
        yield str(error)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for items in inner for x in items if isinstance(x, dict | list)]
        depth += 1
    return depth


DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
SHAPE_FILES = ["config.json", "*.index.json"]  # what tells sizes
DEQUANTISED = ("fp8", "mxfp4")  # quantisation methods whose weights are read


@dataclass(frozen=True)
class Source:
    """A model that was found. `commit` is set for one from the hub, whose weights may not be here
    yet."""

    name: str
    folder: Path  # or a GGUF file
    is_pack: bool
    commit: str | None = None


def find(
    name: str,
    *,
    revision: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
    files: Sequence[str] = TEXT_FILES,
) -> Source:
    """The model `name` (not "demo"); of a hub model only `files`, patterns of small ones, are
    fetched.

    Raises `SourceError`.
    """
    path = user_path(name)
    if path.is_dir():
        if is_pack(path):
            return Source(name, path, is_pack=True)
        if (path / "config.json").is_file():
            return Source(path.resolve().name, path, is_pack=False)
        return _gguf_in(path)
    if path.is_file() and is_gguf(path):
        return Source(model_name(path), path, is_pack=False)
    if path.exists():
        raise SourceError(
            f"{path} is a file: name the folder of a safetensors checkpoint or a pack, or a .gguf "
            "file"
        )
    if not HUB_ID.fullmatch(name):
        raise SourceError(
            f"{name}: there is no such folder, and it is not the form of a hub id (owner/name)"
        )
    patterns = [*files, *(["*.py"] if trust_remote_code else [])]
    folder = _snapshot(name, revision, local_files_only, patterns)
    return Source(name, folder, is_pack=False, commit=folder.name)


def _gguf_in(folder: Path) -> Source:
    models = models_in(folder)
    if not models:
        raise SourceError(f"{folder} has neither config.json nor manifest.json: it is not a model")
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise SourceError(f"{folder} has several models: name one of {names}")
    return Source(model_name(models[0]), models[0], is_pack=False)


def fetch_weights(source: Source, *, local_files_only: bool) -> None:
    """Fetch the weights of a hub model into the hub's cache. Raises `SourceError`."""
    if source.commit is not None:
        _snapshot(source.name, source.commit, local_files_only, TEXT_FILES + WEIGHT_FILES)


def _snapshot(name: str, revision: str | None, local_files_only: bool, patterns: list[str]) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=patterns
        )
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{name} is neither a folder here nor in the hub's local cache, and the hub cannot be "
            "asked: check the name, the connection, or HF_HUB_OFFLINE"
        ) from None
    except Exception as error:  # the hub's library lets those of its transport through
        raise SourceError(
            f"{name} is neither a folder here nor a model the hub gives out ({reason(error)}): "
            "check the name, the revision, and HF_TOKEN for a gated model"
        ) from None
    if not (Path(folder) / "config.json").is_file():
        raise SourceError(f"{name} has no config.json: it is not a transformers checkpoint")
    return Path(folder)


def _remote_code(config: dict[str, Any]) -> str | None:
    """Where the code of a config class is, when it comes with the checkpoint."""
    given = config.get("auto_map")
    reference = given.get("AutoConfig") if isinstance(given, dict) else None
    return reference if isinstance(reference, str) else None


def read_config(source: str, folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a checkpoint, GGUF file or pack, without word of quantisation.

    Raises `SourceError` or `CheckpointError`.
    """
    if is_gguf(folder):
        return gguf_config.read_config(folder)
    file = folder / "config.json"
    raw = read_object(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file} has no model_type: fetch it again")
    if kind not in CONFIG_MAPPING:
        remote = _remote_code(raw)
        if not remote:
            raise SourceError(f"{source}: transformers does not know {kind!r}: a newer one may")
        if not trust_remote_code:
            raise SourceError(
                f"{source} wants to run its own code ({remote.partition('.')[0]}.py in its "
                "folder): read it, then pass --trust-remote-code (trust_remote_code=True) if you "
                "trust it"
            )
    _check_quantisation(source, raw)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # weights are dequantised when they are read
    except Exception as error:  # whatever a config class raises on what is in the file
        raise CheckpointError(
            f"{file} is not a usable config ({reason(error)}): fetch it again"
        ) from None
    return config


def _check_quantisation(source: str, raw: dict[str, Any]) -> None:
    """Raise `SourceError` for weights that are quantised in a way that is not read."""
    for part in (raw, raw.get("text_config")):
        given = part.get("quantization_config") if isinstance(part, dict) else None
        method = given.get("quant_method") if isinstance(given, dict) else given
        if given and method not in DEQUANTISED:
            raise SourceError(
                f"{source} is already quantised ({method}), which is not read: use the checkpoint "
                "in bfloat16, float16, float32, fp8 or mxfp4, or a GGUF file"
            )
