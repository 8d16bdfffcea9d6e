"""The files beside a checkpoint's weights that its packs have too: config, tokenizer, template."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError
from offload.files import read_object, unreadable, write_whole
from offload.model.formats.gguf_config import save_config_files
from offload.model.layout import INDEX, is_gguf
from offload.model.odd import PACKED
from offload.pack.fingerprint import stamp
from offload.pack.shelf import KeptPack
from offload.quant.manifest import MANIFEST, manifest_check
from offload.version import __version__

logger = logging.getLogger("offload")

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
# transformers reports this in place of the file of weights that it looks for. Without it,
# `from_pretrained` would fill the experts with random numbers, because a pack's dense weights look
# like a whole checkpoint's. Other programs refuse a quantisation that they do not know.
NOT_A_CHECKPOINT = {
    "transformers_weights": "this folder is a pack, whose experts only moe-offload can read: open "
    "it with offload.load",
    "quantization_config": {"quant_method": PACKED},
}


def companions(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that belongs beside the weights of the model at `path`.

    Raises `OffloadError`.
    """
    if is_gguf(path):
        with tempfile.TemporaryDirectory() as scratch:
            save_config_files(path, Path(scratch))
            yield from _in_folder(Path(scratch))
    else:
        yield from _in_folder(path)


def _in_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in (file for pattern in COPIED for file in sorted(folder.glob(pattern))):
        if file.name in (INDEX, MANIFEST) or not (file.is_file() or file.name == "config.json"):
            continue
        try:
            content = file.read_bytes()
        except PermissionError:
            raise unreadable(file) from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from None
        yield file.name, _config_of_pack(file) if file.name == "config.json" else content


def _config_of_pack(file: Path) -> bytes:
    """A config without the checkpoint's quantisation, which a pack's dense weights do not have, and
    with what keeps other programs from taking the pack for a checkpoint."""
    config = read_object(file)
    if isinstance(text := config.get("text_config"), dict):
        text.pop("quantization_config", None)
    return json.dumps({**config, **NOT_A_CHECKPOINT}, indent=2).encode()


def made_from(path: Path) -> str:
    """What the companions of a GGUF file depend on, as making its tokenizer takes seconds; empty
    for a folder, whose files are simply compared."""
    return f"{__version__} {stamp(path)}" if is_gguf(path) else ""


def follow(pack: KeptPack, path: Path, *, whole: bool) -> None:
    """Give `pack` the files that now lie beside the weights of its checkpoint at `path`.

    Files that are no longer there are removed if `path` is `whole`, which a folder of the hub's
    cache need not be. Raises `OffloadError`.
    """
    if is_gguf(path) and made_from(path) == pack.origin.companions:
        return
    found = dict(companions(path))
    known = {name: entry["sha256"] for name, entry in pack.manifest["files"].items()}
    known = {name: sha for name, sha in known.items() if _is_companion(name)}
    new = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    gone = known.keys() - new.keys() if whole else set()
    changed = [
        name
        for name, sha in new.items()
        if sha != known.get(name) or not _is_there(pack.path / name, found[name])
    ]
    if "config.json" in changed and _plain(pack.path) == _plain(path):
        changed.remove("config.json")  # earlier versions wrote no `NOT_A_CHECKPOINT`, and read none
    if not changed and not gone:
        return
    entries = {name: {"bytes": len(found[name]), "sha256": new[name]} for name in changed}
    files = {n: entry for n, entry in pack.manifest["files"].items() if n not in gone} | entries
    manifest = {**pack.manifest, "files": dict(sorted(files.items()))}
    manifest["check"] = manifest_check(manifest)
    try:
        for name in changed:
            write_whole(pack.path / name, found[name])
        write_whole(pack.path / MANIFEST, json.dumps(manifest, indent=1).encode())
        for name in gone:
            (pack.path / name).unlink(missing_ok=True)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): it keeps its old %s",
            pack.path,
            error.strerror or error,
            ", ".join(sorted([*changed, *gone])),
        )


def _is_there(file: Path, content: bytes) -> bool:
    """Whether a file has this content; an earlier change may have been interrupted."""
    return file.is_file() and file.read_bytes() == content


def _plain(path: Path) -> dict[str, Any] | None:
    """The config in a folder, without what makes the config of a pack differ."""
    if is_gguf(path):
        return None
    config = read_object(path / "config.json")
    return {name: value for name, value in config.items() if name not in NOT_A_CHECKPOINT}


def _is_companion(name: str) -> bool:
    return name != INDEX and any(fnmatch(name, pattern) for pattern in COPIED)
