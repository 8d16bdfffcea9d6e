"""The fixed texts on which two models are compared.

In a file of prompts, a line `--- NAME` begins the prompt NAME; text before the first such line is
the prompt "1". The built-in set (prose, code, maths, dialogue, Hebrew) is this project's own.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from offload.errors import QualityError, SourceError
from offload.files import read_text

BUILT_IN = Path(__file__).with_name("prompts.txt")
HEADING = re.compile(r"^--- +(\S.*?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Prompts:
    """Named texts; `sha256` depends on the names and the texts, but not on the file's layout."""

    names: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        parts = "\0".join(
            part for pair in zip(self.names, self.texts, strict=True) for part in pair
        )
        return hashlib.sha256(parts.encode()).hexdigest()


def read_prompts(file: Path | None = None) -> Prompts:
    """Read the prompts of `file`, or the built-in ones for None. Raises `QualityError`."""
    try:
        with (file or BUILT_IN).open(encoding="utf-8") as handle:
            text = read_text(handle, "it")
    except (OSError, SourceError) as error:
        raise QualityError(f"cannot read the prompts from {file}: {error}") from None
    first, *rest = HEADING.split(text)
    pairs = [("1", first), *zip(rest[::2], rest[1::2], strict=True)]
    named = {name: body.strip("\n") for name, body in pairs if body.strip()}
    if not named:
        raise QualityError(f"{file} holds no prompts: write texts, each under a line `--- NAME`")
    if len(named) < sum(bool(body.strip()) for _, body in pairs):
        raise QualityError(f"{file} has two prompts with the same name: names must differ")
    return Prompts(tuple(named), tuple(named.values()))
