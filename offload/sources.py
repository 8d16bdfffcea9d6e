"""What a model's name stands for: a pack, a checkpoint folder, a hub id, or the demo.

Knows: folders, the hub's cache, what is refused and why. Does not know: what is inside the weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from offload.errors import CheckpointError, SourceError
from offload.files import user_path
from quant.pack import is_pack

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A model that was found. `commit` is set for one from the hub, whose weights may not be here
    yet."""

    name: str
    folder: Path
    is_pack: bool
    commit: str | None = None


def find(
    name: str, *, revision: str | None, local_files_only: bool, trust_remote_code: bool
) -> Source:
    """The model `name` (not "demo"); of a hub model only the small files are fetched.

    Raises `SourceError`.
    """
    path = user_path(name)
    if path.is_dir():
        if is_pack(path):
            return Source(name, path, is_pack=True)
        if (path / "config.json").is_file():
            return Source(path.resolve().name, path, is_pack=False)
        raise SourceError(f"{path} has neither config.json nor manifest.json: it is not a model")
    if path.exists():
        raise SourceError(
            f"{path} is a file: name the folder of a safetensors checkpoint or a pack"
        )
    if not HUB_ID.fullmatch(name):
        raise SourceError(
            f"{name}: there is no such folder, and it is not the form of a hub id (owner/name)"
        )
    patterns = TEXT_FILES + (["*.py"] if trust_remote_code else [])
    folder = _snapshot(name, revision, local_files_only, patterns)
    return Source(name, folder, is_pack=False, commit=folder.name)


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
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(
            f"{name} is neither a folder here nor a model the hub gives out ({reason}): check the "
            "name, the revision, and HF_TOKEN for a gated model"
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
    """The config of a checkpoint or pack. Raises `SourceError` or `CheckpointError`."""
    file = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = str(raw["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}): fetch it again") from None
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
    if raw.get("quantization_config"):
        given = raw["quantization_config"]
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise SourceError(
            f"{source} is already quantised ({method}), which is not read yet: use the checkpoint "
            "in bfloat16, float16 or float32"
        )
    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a config class raises on what is in the file
        raise CheckpointError(f"{file} is not a usable config ({error}): fetch it again") from None
