"""Finds the model that a name stands for: a pack, a checkpoint folder, a GGUF file or a hub id."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.errors import SourceError
from offload.files import packs_folder, read_object, user_path
from offload.lines import reason
from offload.model.layout import INDEX, SINGLE, is_gguf, model_name, models_in
from offload.model.odd import check_folder
from offload.options import LoadOptions
from offload.quant.manifest import is_pack

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
WEIGHT_FILES = ["*.safetensors"]
SHAPE_FILES = ["config.json", "*.index.json"]  # the files that tell a model's sizes


@dataclass(frozen=True)
class FoundModel:
    """A model that was found.

    A model from the hub has a `commit`, and its weights may not have been fetched yet.
    """

    name: str
    folder: Path  # or a GGUF file
    is_pack: bool
    commit: str | None = None


def find(name: str, options: LoadOptions, files: Sequence[str] = TEXT_FILES) -> FoundModel:
    """The model `name`: a pack, a checkpoint folder, a GGUF file, a hub id, or "demo".

    The demo is built if need be, which imports torch. For a hub model, only files that match the
    patterns `files` are fetched. Raises `SourceError`.
    """
    if name == DEMO:
        from offload.model import demo

        return FoundModel(name, demo.checkpoint(), is_pack=False)
    if found := find_here(name, options.pack_dir):
        return found
    patterns = [*files, *(["*.py"] if options.trust_remote_code else [])]
    folder = _snapshot(name, options.revision, options.local_files_only, patterns)
    return FoundModel(name, folder, is_pack=False, commit=folder.name)


def find_here(name: str, pack_dir: str | Path | None = None) -> FoundModel | None:
    """The pack, checkpoint folder or GGUF file `name`; None for a hub id. Raises `SourceError`.

    A pack may be called by its name in `pack_dir`, or in the folder that packs are kept in.
    """
    path = user_path(name)
    if not path.exists() and is_pack(kept := packs_folder(pack_dir) / name):
        return FoundModel(name, kept, is_pack=True)
    if path.is_dir():
        if is_pack(path):
            return FoundModel(name, path, is_pack=True)
        check_folder(path)
        if (path / "config.json").is_file():
            return FoundModel(path.resolve().name, path, is_pack=False)
        return _gguf_in(path)
    if path.is_file() and is_gguf(path):
        return FoundModel(model_name(path), path, is_pack=False)
    if path.exists():
        raise SourceError(
            f"{path} is a file: name the folder of a safetensors checkpoint or a pack, or a .gguf "
            "file"
        )
    if is_gguf(path):
        raise SourceError(f"there is no file {name}: check its path")
    if not HUB_ID.fullmatch(name):
        raise SourceError(
            f"{name}: there is no such folder, and it is not the form of a hub id (owner/name)"
        )
    return None


def _gguf_in(folder: Path) -> FoundModel:
    models = models_in(folder)
    if not models:
        raise SourceError(f"{folder} has neither config.json nor manifest.json: it is not a model")
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise SourceError(f"{folder} has several models: name one of {names}")
    return FoundModel(model_name(models[0]), models[0], is_pack=False)


def fetch_weights(source: FoundModel, *, local_files_only: bool) -> None:
    """Fetch the weights of a hub model into the hub's cache. Raises `SourceError`."""
    if source.commit is not None:
        _snapshot(source.name, source.commit, local_files_only, TEXT_FILES + WEIGHT_FILES)


def weight_blobs(source: FoundModel, *, local_files_only: bool) -> str:
    """A digest of the contents of a hub model's weight files, which the hub tells without sending
    them; empty if it does not."""
    index = source.folder / INDEX
    try:
        named = read_object(index)["weight_map"].values() if index.is_file() else [SINGLE]
        files = sorted(set(named))
        blobs = {name: _blob(source.folder / name) for name in files}
        if not all(blobs.values()) and not local_files_only:
            from huggingface_hub import HfApi

            for file in HfApi().get_paths_info(source.name, files, revision=source.commit):
                if lfs := getattr(file, "lfs", None):
                    blobs[file.path] = lfs.sha256
    except Exception:  # whatever the index or the hub's transport is; weights are then fetched
        return ""
    told = json.dumps(sorted(blobs.items()))
    return hashlib.sha256(told.encode()).hexdigest() if all(blobs.values()) else ""


def _blob(file: Path) -> str:
    """The SHA-256 of a file in the hub's cache, which links to a blob of that name; else ""."""
    name = file.readlink().name if file.is_symlink() else ""
    return name if len(name) == 64 else ""


def _snapshot(name: str, revision: str | None, local_files_only: bool, patterns: list[str]) -> Path:
    import huggingface_hub  # imported here because a local model does not need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=patterns
        )
    except LocalEntryNotFoundError:
        raise SourceError(
            f"there is no folder {name}, the hub's local cache has no such model, and the hub "
            "cannot be reached: check the name and the connection, or unset HF_HUB_OFFLINE"
        ) from None
    except Exception as error:  # huggingface_hub raises its transport's errors too
        raise SourceError(
            f"there is no folder {name}, and the hub gives out no such model ({reason(error)}): "
            "check the name, the revision, and HF_TOKEN for a gated model"
        ) from None
    if not (Path(folder) / "config.json").is_file():
        raise SourceError(f"{name} has no config.json: it is not a transformers checkpoint")
    return Path(folder)
