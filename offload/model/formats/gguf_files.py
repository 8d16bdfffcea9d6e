"""A GGUF model's files: one, or the parts `name-00001-of-00003.gguf` of one.

Knows: their names. Does not know: what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path

from offload.errors import CheckpointError

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether `path` names a GGUF file rather than a checkpoint folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def gguf_files(path: Path) -> list[Path]:
    """All parts of the model that `path` is one of, in order. Raises `CheckpointError`."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    files = [
        path.with_name(f"{part['stem']}-{number:05d}-of-{part['count']}{path.suffix}")
        for number in range(1, int(part["count"]) + 1)
    ]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, a part of {path.name}: fetch it again")
    return files


def model_name(path: Path) -> str:
    """What the model in `path` is called."""
    part = _PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def models_in(folder: Path) -> list[Path]:
    """The GGUF models in `folder`, each by its first file."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*")):
        if is_gguf(file) and file.is_file():
            found.setdefault(model_name(file), file)
    return list(found.values())
