"""The packs that are kept in a folder, and what is noted beside each of them; without torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from offload.files import write_whole
from offload.pack.fingerprint import PREFIX
from offload.pack.recipe import Recipe
from offload.quant.errors import OffloadError, PackError
from offload.quant.manifest import is_pack, read_manifest

ORIGIN = "origin.json"
PARTIAL, LOCK = ".partial", ".lock"  # endings of what lies beside a pack while it is made
SETTINGS = ".settings"  # in a partial pack: what its manifest will say
MOST_STAMPS = 16  # places of one checkpoint that are remembered


@dataclass(frozen=True)
class Origin:
    """Where a pack's checkpoint was when the pack was last used, as `ORIGIN` says."""

    place: str = ""  # a folder, a GGUF file, a hub id, or "demo"; empty if it is not known
    stamps: tuple[str, ...] = ()  # of places that have these weights; a hub's commit is a stamp
    weights: str = ""  # the fingerprint
    blobs: str = ""  # what `weight_blobs` said of the hub's files
    companions: str = ""  # what the files beside the weights were made from, if it was a GGUF file

    @classmethod
    def read(cls, pack: Path) -> Origin:
        """What is noted; nothing if the note is missing or damaged."""
        try:
            found = json.loads((pack / ORIGIN).read_text(encoding="utf-8"))
            stamps = tuple(str(stamp) for stamp in found["stamps"])
            names = ("place", "weights", "blobs", "companions")
            rest = {name: str(found.get(name, "")) for name in names}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls()
        return cls(stamps=stamps, **rest)

    def write(self, pack: Path) -> None:
        """Note this, which also says that the pack is used now. A failure is ignored."""
        with contextlib.suppress(OSError):  # a pack may be in a folder that is read-only
            if self == Origin.read(pack):
                os.utime(pack / ORIGIN)
            else:
                write_whole(pack / ORIGIN, json.dumps(asdict(self), indent=1).encode())


@dataclass(frozen=True)
class KeptPack:
    """A pack in a folder, as its manifest and its notes tell."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> KeptPack | None:
        """The pack at `path`; None if it is none, or cannot be used."""
        try:
            return cls(path, read_manifest(path)) if is_pack(path) else None
        except PackError:
            return None

    @cached_property
    def origin(self) -> Origin:
        return Origin.read(self.path)

    @property
    def source(self) -> str:
        """The name of the model."""
        return str(self.manifest["source"])

    @property
    def place(self) -> str:
        """Where the checkpoint was; the name of the model if that is not known."""
        return self.origin.place or self.source

    @property
    def bits(self) -> str:
        return str(self.manifest["bits"])

    @property
    def bits_name(self) -> str:
        """The preset that the pack was made with, else its rules."""
        try:
            return Recipe.parse(self.bits).name.replace("g64", "")  # the usual group
        except OffloadError:
            return self.bits

    @property
    def experts(self) -> list[tuple[str, int]]:
        """The path of each experts module, and its number of experts."""
        return [(layer["module"], layer["num_experts"]) for layer in self.manifest["layers"]]

    @property
    def weights(self) -> str:
        """The fingerprint of the checkpoint; empty if the pack has one of another kind."""
        made_from = str(self.manifest["fingerprint"])
        return made_from if made_from.startswith(PREFIX) else self.origin.weights

    @property
    def stamps(self) -> set[str]:
        """What identifies places that have the weights of this pack, see `Origin.stamps`."""
        return {*self.origin.stamps, str(self.manifest["fingerprint"])}

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self.path)

    @property
    def last_used(self) -> float:
        """The time, in seconds since 1970."""
        files = (self.path / name for name in (ORIGIN, "hot.json", "manifest.json"))
        return max(file.stat().st_mtime for file in files if file.is_file())

    def note(self, stamp: str, **rest: str) -> None:
        """Note that the pack is used now for the checkpoint that `Origin` describes so."""
        stamps = [stamp, *(known for known in self.origin.stamps if known != stamp)]
        Origin(stamps=tuple(stamps[:MOST_STAMPS]), **rest).write(self.path)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; one that has several names counts once."""
    files = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
    stats = [file.stat() for file in files]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def kept_packs(folder: Path) -> list[KeptPack]:
    """The packs in `folder` that can be used, by name."""
    try:
        found = (KeptPack.read(path) for path in sorted(folder.iterdir()))
        return [pack for pack in found if pack is not None]
    except OSError:  # there is no such folder, or it may not be read
        return []


def name_of(model: str, recipe: Recipe) -> str:
    """The name of the folder for a model's pack, like `Mixtral-8x7B-Instruct-v0.1-q4`."""
    whole = re.sub(r"[^\w.-]+", "-", model.rpartition("/")[2]).strip(".-").encode()
    slug = whole[:100].decode(errors="ignore") or "model"  # a file's name has 255 bytes at most
    rules = recipe.name.replace("experts=", "e").replace("attention=", "a").replace("g64", "")
    how = re.sub(r"[^\w.-]+", "-", rules)
    if len(how) > 40:
        how = f"{how[:30]}-{hashlib.sha256(str(recipe).encode()).hexdigest()[:8]}"
    return f"{slug}-{how}"


def new_place(folder: Path, model: str, recipe: Recipe, weights: str) -> Path:
    """Where to make the pack of `model` with the fingerprint `weights`, which is not made yet.

    A short digest ends the name if something else has the name already.
    """
    path = folder / name_of(model, recipe)
    if not path.exists() and _may_go_on(path, recipe, weights):
        return path
    digest = hashlib.sha256(f"{weights} {recipe}".encode()).hexdigest()
    return path.with_name(f"{path.name}-{digest[:6]}")


def _may_go_on(path: Path, recipe: Recipe, weights: str) -> bool:
    """Whether no other pack is being made at `path`, or was and could not be finished."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        settings = json.loads((partial / SETTINGS).read_text(encoding="utf-8"))
        return bool((settings["fingerprint"], settings["bits"]) == (weights, str(recipe)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return not partial.exists()
