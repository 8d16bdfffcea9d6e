"""Paths and texts that a user names; files that are whole or not there.

Knows: which names are no paths, that a text may be no text or have no end, and that a program may
be killed while it writes. Does not know: what files are for.
"""

from __future__ import annotations

import os
from errno import EISDIR, ELOOP, ENAMETOOLONG
from pathlib import Path
from typing import TextIO

import psutil

from offload.errors import SourceError

MOST_CHARACTERS = 2**24  # of a prompt: more than any context holds, less than any memory


def read_text(file: TextIO, name: str) -> str:
    """What `file` holds, which messages call `name`. Raises `SourceError` when it is no text."""
    try:
        text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise SourceError(f"cannot read {name}: {error.strerror or error}") from None
    if len(text) > MOST_CHARACTERS:
        raise SourceError(f"{name} has more than {MOST_CHARACTERS} characters: give a shorter one")
    return text


def user_path(text: str | Path) -> Path:
    """The path a user wrote, `~` replaced. Raises `SourceError` when it cannot be one."""
    if not str(text).strip():  # Python would take it for the current folder
        raise SourceError("a name is empty: give the name of a file, a folder or a model")
    try:
        path = Path(text).expanduser()
        path.lstat()
    except RuntimeError:  # there is no such user, or nobody knows their home
        raise SourceError(
            f"{text}: that home folder is not known: write the path out, or set OFFLOAD_HOME"
        ) from None
    except ValueError as error:
        raise SourceError(f"{str(text)!r} is no path ({error}): correct it") from None
    except OSError as error:  # that it is not there, or not to be read, is for those who use it
        if error.errno in (ELOOP, ENAMETOOLONG):
            raise SourceError(f"{text} is no path ({error.strerror}): correct it") from None
    return path


def check_writable(file: Path) -> None:
    """Raise `OSError` now where writing `file` would raise it after long work."""
    if file.is_dir():
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    file.touch()


def write_whole(file: Path, data: bytes) -> None:
    """Write `file` so that at any moment it holds what it held, or `data`; of two processes the
    last one's stays. Raises `OSError`.

    What killed processes left of their own attempts is removed.
    """
    for left in file.parent.glob(f".{file.name}.*.part"):
        pid = left.name.split(".")[-2]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            left.unlink(missing_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
