"""The manifest that makes a folder a pack, read as JSON and without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from offload.quant.errors import PackError

FORMAT = "moe-offload pack"
VERSION = 2
MANIFEST = "manifest.json"
REMAKE = "delete the folder and load the model again to remake it"


def layer_file(index: int) -> str:
    """The name of the file that holds the experts of the MoE layer `index`."""
    return f"experts-{index:05d}.safetensors"


def is_pack(path: Path) -> bool:
    """Whether `path` is a pack, perhaps a damaged one.

    Other programs write a manifest.json as well. A folder with one is a pack if the manifest says
    so, or if the first layer's expert file lies beside it.
    """
    if not (path / MANIFEST).is_file():
        return False
    if (path / layer_file(0)).is_file():
        return True
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_check(manifest: dict[str, Any]) -> str:
    """The checksum that a manifest carries as `check`, made from its other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the pack at `path`, without its checksum. Raises `PackError`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(
            f"{path} is not a pack: cannot read {MANIFEST} ({error}): {REMAKE}"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackError(f"{path / MANIFEST} is not a {FORMAT}: {REMAKE}")
    if manifest.get("version") != VERSION:
        raise PackError(
            f"{path} is a pack of version {manifest.get('version')}, this program reads version "
            f"{VERSION}: {REMAKE}"
        )
    if manifest.pop("check", None) != manifest_check(manifest):
        raise PackError(f"{path / MANIFEST} does not match its checksum: {REMAKE}")
    return manifest
