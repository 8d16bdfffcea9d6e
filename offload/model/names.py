"""Finds the model that a name stands for: a pack, a checkpoint folder, a GGUF file or a hub id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import SourceError
from offload.files import packs_folder, user_path
from offload.model.ids import DEMO as DEMO
from offload.model.ids import HubName, hub_name, known_model
from offload.model.layout import gguf_files, is_gguf, model_name, models_in
from offload.model.odd import check_folder
from offload.options import LoadOptions
from offload.quant.errors import OffloadError
from offload.quant.manifest import is_pack

if TYPE_CHECKING:
    from offload.model.hub import Repository
    from offload.model.known import KnownModel

# Small files at the top of a repository; folders in it hold other forms of the model.
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
SHAPE_FILES = ("config.json", "*.index.json")  # the files that tell a model's sizes


@dataclass(frozen=True)
class FoundModel:
    """A model that was found.

    A model from the hub has a `commit` and a `repository`, and its weights may not be here yet.
    """

    name: str
    folder: Path  # or a GGUF file
    is_pack: bool
    commit: str | None = None
    repository: Repository | None = field(default=None, compare=False)


def find(name: str, options: LoadOptions, files: Sequence[str] = TEXT_FILES) -> FoundModel:
    """The model `name`: a pack, a checkpoint folder, a GGUF file, a hub id, or "demo".

    The demo is built if need be, which imports torch. For a hub model, only files that match the
    patterns `files` are fetched. Raises `SourceError`.
    """
    if name == DEMO:
        from offload.model import demo

        return FoundModel(name, demo.checkpoint(), is_pack=False)
    here = find_here(name, options.pack_dir)
    return here or find_on_hub(hub_name(name), options, files)


def find_here(name: str, pack_dir: str | Path | None = None) -> FoundModel | None:
    """The pack, checkpoint folder or GGUF file `name`; None for a hub id and for "demo".

    A pack may be called by its name in `pack_dir`, or in the folder that packs are kept in. Raises
    `SourceError`.
    """
    if name == DEMO:
        return None
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
    hub_name(name, packs_folder(pack_dir))  # raises if it is no name on the hub either
    return None


def _gguf_in(folder: Path) -> FoundModel:
    models = models_in(folder)
    if not models:
        raise SourceError(f"{folder} has neither config.json nor manifest.json: it is not a model")
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise SourceError(f"{folder} has several models: name one of {names}")
    return FoundModel(model_name(models[0]), models[0], is_pack=False)


def find_known(name: str, options: LoadOptions) -> KnownModel | None:
    """The published model `name`, if it can be described without the hub and is not here yet."""
    known = known_model(name) if options.revision is None else None
    if known is None or find_here(name, options.pack_dir) is not None:
        return None
    from offload.model.hub import kept_folder

    folder = kept_folder(hub_name(name).id, None)
    return known if folder is None or not (folder / "config.json").is_file() else None


def find_on_hub(asked: HubName, options: LoadOptions, files: Sequence[str]) -> FoundModel:
    """The model `asked` on the hub, with those of its small files that match the patterns `files`.

    A GGUF model is one file: it is fetched, or for `SHAPE_FILES` its header alone. Raises
    `SourceError`.
    """
    from offload.model import hub  # imported here because a local model does not need it

    repository = hub.open_repository(asked, options.revision, options.local_files_only)
    if asked.file or asked.quant or not repository.matching(["config.json"]):
        parts = hub.gguf_files_of(repository, asked)
        missing = hub.missing_bytes(repository, parts)
        fetch = hub.fetch_headers if files == SHAPE_FILES and missing else hub.fetch_large
        folder = fetch(repository, parts)
        name = asked.model if asked.file or asked.quant else f"{asked.id}/{parts[0].path}"
        return FoundModel(name, folder / parts[0].path, False, repository.commit, repository)
    patterns = [*files, *(["*.py"] if options.trust_remote_code else [])]
    hub.fetch_small(repository, patterns)
    return FoundModel(asked.id, repository.folder, False, repository.commit, repository)


def fetch_weights(source: FoundModel) -> None:
    """Fetch the weights of a hub model into the hub's cache. Raises `SourceError`."""
    if source.repository is not None and not is_gguf(source.folder):
        from offload.model import hub

        hub.fetch_large(source.repository, hub.weights_of(source.repository))


def weight_blobs(source: FoundModel) -> str:
    """A digest of the contents of a hub model's weight files, which the hub tells without sending
    them; empty if it does not."""
    if source.repository is None:
        return ""
    from offload.model import hub

    try:
        contents = {file.path: file.etag for file in hub.weights_of(source.repository)}
    except OffloadError:  # weights are then fetched
        return ""
    told = json.dumps(sorted(contents.items()))
    return hashlib.sha256(told.encode()).hexdigest() if all(contents.values()) else ""


def missing_bytes(source: FoundModel) -> int | None:
    """Bytes of the weights of a hub model that are still to be fetched; None if that is unknown."""
    if source.repository is None:
        return None
    from offload.model import hub

    try:
        if is_gguf(source.folder):
            paths = [file.name for file in gguf_files(source.folder)]
            parts = [f for f in source.repository.files if f.path.rpartition("/")[2] in paths]
        else:
            parts = hub.weights_of(source.repository)
    except OffloadError:
        return None
    return hub.missing_bytes(source.repository, parts)
