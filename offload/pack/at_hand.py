"""Which packs and checkpoints are on this machine, and what of them can go; without torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offload.errors import SourceError
from offload.files import offload_home, read_object, user_path
from offload.lines import did_you_mean
from offload.model.ids import DEMO
from offload.model.layout import is_gguf, models_in, weight_files
from offload.pack.fingerprint import fingerprint, former_fingerprint
from offload.pack.shelf import LOCK, PARTIAL, SETTINGS, KeptPack, kept_packs, size_of
from offload.quant.errors import OffloadError
from offload.quant.manifest import MANIFEST, is_pack, layer_file

# The names that configs have for the number of experts.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def number(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the numbers called `names` in a config or its text part."""
    parts = (config, config.get("text_config"), config.get("ffn_config"))
    values = (part.get(name) for part in parts if isinstance(part, dict) for name in names)
    return next((value for value in values if type(value) is int), None)


def stored_as(config: dict[str, Any]) -> str:
    """How the weights of a checkpoint with this config are stored, like "bf16" or "fp8"."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(given := part.get("quantization_config"), dict):
            return str(given.get("quant_method", "quantised"))
        if dtype := part.get("dtype", part.get("torch_dtype")):
            return SHORT.get(str(dtype), str(dtype))
    return ""


@dataclass(frozen=True)
class KeptCheckpoint:
    """A Mixture-of-Experts checkpoint whose weights are here."""

    name: str  # a hub id, "demo", or the path of a user's folder or GGUF file
    path: Path  # the folder that has the config, or a GGUF file
    removable: Path | None  # what `offload rm` removes; None for what is the user's own
    last_used: float  # the time, in seconds since 1970

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config; empty for a GGUF file."""
        return {} if is_gguf(self.path) else read_object(self.path / "config.json")

    @property
    def bits_name(self) -> str:
        return "gguf" if is_gguf(self.path) else stored_as(self.config)

    @cached_property
    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self.removable or self.path)


def _is_moe(path: Path) -> bool:
    """Whether `path`, a folder or GGUF file, is a whole checkpoint with experts."""
    if is_gguf(path):
        return _has_experts(path)
    try:
        config = read_object(path / "config.json")
        return (number(config, EXPERTS) or 0) > 1 and bool(weight_files(path))
    except OffloadError:
        return False


def _has_experts(file: Path) -> bool:
    """Whether the metadata at the beginning of a GGUF file counts experts."""
    try:
        with file.open("rb") as handle:
            key = b".expert_count\x04\x00\x00\x00"  # followed by a number of 32 bits, type 4
            _, found, rest = handle.read(2**16).partition(key)
    except OSError:
        return False
    return bool(found) and int.from_bytes(rest[:4], "little") > 1


def _used(path: Path) -> float:
    return (path if path.is_file() else path / "config.json").stat().st_atime


def checkpoints(packs: list[KeptPack]) -> list[KeptCheckpoint]:
    """The demo, the models in the hub's cache, and the folders that `packs` were made from."""
    found = [*_demo(), *_in_hub_cache()]
    places = {pack.origin.place for pack in packs} - {each.name for each in found}
    for path in (Path(place) for place in sorted(places) if Path(place).is_absolute()):
        if path.exists() and _is_moe(path):
            found.append(KeptCheckpoint(str(path), path, None, _used(path)))
    return sorted(found, key=lambda each: each.name.lower())


def _demo() -> Iterator[KeptCheckpoint]:
    home = offload_home() / DEMO
    for folder in sorted(home.glob("*/config.json"))[-1:]:
        if _is_moe(folder.parent):
            yield KeptCheckpoint(DEMO, folder.parent, home, _used(folder.parent))


def _in_hub_cache() -> Iterator[KeptCheckpoint]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError, RuntimeError):  # there is none, or no home for it
        return
    for repo in repositories:
        revisions = sorted(repo.revisions, key=lambda each: each.last_modified, reverse=True)
        folders = [each.snapshot_path for each in revisions]
        paths = [path for folder in folders for path in (folder, *models_in(folder))]
        if repo.repo_type == "model" and (path := next(filter(_is_moe, paths), None)):
            yield KeptCheckpoint(repo.repo_id, path, repo.repo_path, repo.last_accessed)


# --- what can be removed --------------------------------------------------------------------------


@dataclass(frozen=True)
class Removable:
    """Something that a user may remove."""

    name: str
    path: Path
    why: str = ""

    @cached_property
    def size(self) -> int:
        """Bytes that become free; what a link leads to stays."""
        return 0 if self.path.is_symlink() else size_of(self.path)


def find_removable(name: str, folder: Path) -> Removable:
    """What `offload rm` removes for `name`: a pack in `folder` or at a path, the demo, a hub model.

    Raises `SourceError`.
    """
    path = user_path(name)
    for place in (path, folder / name):
        if is_pack(place) and (place == path or not path.exists()):
            return Removable(name, place, "link alone" if place.is_symlink() else "")
    packs = kept_packs(folder)
    here = {each.name: each for each in checkpoints(packs)}
    if (found := here.get(name)) is not None and found.removable is not None:
        return Removable(name, found.removable)
    if path.exists():
        raise SourceError(
            f"{name} is not a pack: offload rm removes packs, and models by the names that offload "
            "list shows; remove your own files yourself"
        )
    known = [pack.path.name for pack in packs] + [each.name for each in here.values()]
    raise SourceError(
        f"there is no pack or model {name!r} on this machine{did_you_mean(name, known)}: offload "
        "list shows what there is"
    )


def find_leftovers(folder: Path) -> Iterator[Removable]:
    """What nobody needs: unfinished packs and locks that no process holds, halves of removed packs,
    and packs in `folder` whose checkpoint has other weights now."""
    for place in (folder, offload_home() / DEMO):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix == LOCK and not path.lstat().st_size and not _is_held(path):
                yield Removable(path.name, path, "lock that no process holds")
            elif path.suffix == PARTIAL and not _is_held(path.with_suffix(LOCK)):
                if place != folder or (path / SETTINGS).is_file() or not any(path.iterdir()):
                    yield Removable(path.name, path, "unfinished, and no process is working on it")
            elif (path / layer_file(0)).is_file() and not (path / MANIFEST).is_file():
                yield Removable(path.name, path, "rest of a removed pack")
    packs = kept_packs(folder)
    places = {each.name: each.path for each in checkpoints(packs)}
    for pack in packs:
        made_from = places.get(pack.place)
        if made_from is not None and _has_changed(pack, made_from):
            yield Removable(pack.path.name, pack.path, "its checkpoint has other weights now")


def _has_changed(pack: KeptPack, path: Path) -> bool:
    """Whether the checkpoint at `path` has other weights than those that `pack` was made from."""
    if not pack.weights and len(str(pack.manifest["fingerprint"])) < 64:
        return False  # an earlier version noted only a commit, which need not be the newest
    try:
        now = {fingerprint(path), former_fingerprint(path)}
    except (OffloadError, OSError):
        return False
    return now.isdisjoint({pack.weights, str(pack.manifest["fingerprint"])})


def _is_held(lock: Path) -> bool:
    """Whether a process holds the lock in a file, which need not exist."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def remove(thing: Removable) -> None:
    """Remove it. Raises `SourceError` if it is in use."""
    lock = thing.path.with_name(thing.path.name.removesuffix(PARTIAL) + LOCK)
    with contextlib.ExitStack() as held:
        if lock.exists() and lock != thing.path:
            try:
                held.enter_context(FileLock(lock, timeout=0))
            except Timeout:
                raise SourceError(
                    f"{thing.name} is being made by another process: wait for it, or stop it"
                ) from None
        if user := _user_of(thing.path):
            raise SourceError(f"{thing.name} is in use by process {user}: end that first")
        try:
            if thing.path.is_dir() and not thing.path.is_symlink():
                (thing.path / MANIFEST).unlink(missing_ok=True)  # from now on it is no pack
                shutil.rmtree(thing.path)
            else:
                thing.path.unlink(missing_ok=True)
            if lock.exists() and not lock.stat().st_size:
                lock.unlink()
        except OSError as error:
            raise SourceError(
                f"cannot remove {thing.path} ({error.strerror or error}): check its permissions"
            ) from None


def _user_of(path: Path) -> str:
    """The number and name of a process other than this that has a file in `path` open, or ""."""
    import psutil

    place = str(path.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            opened = (each.path for each in process.open_files() if process.pid != os.getpid())
            if any(file == place or file.startswith(place + os.sep) for file in opened):
                return f"{process.pid} ({process.name()})"
    return ""
