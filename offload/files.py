"""Paths and texts that a user names; files that are whole or not there.

Knows: which names are no paths, that a text may be no text or have no end, and that a program may
be killed while it writes. Does not know: what files are for.
"""

from __future__ import annotations

import io
import json
import os
import sys
from errno import EISDIR, ELOOP, ENAMETOOLONG
from pathlib import Path
from typing import Any, TextIO

import psutil

from offload.errors import CheckpointError, SourceError
from offload.quant.errors import OffloadError

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


def short(path: Path) -> str:
    """`path` as people write it, `~` for their home."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def offload_home() -> Path:
    """`$OFFLOAD_HOME`, else `$XDG_CACHE_HOME/offload`, else `~/.cache/offload`."""
    if home := os.environ.get("OFFLOAD_HOME"):
        return user_path(home)
    cache = os.environ.get("XDG_CACHE_HOME")
    return user_path(cache or "~/.cache") / "offload"


def read_object(file: Path) -> dict[str, Any]:
    """The object in `file`. Raises `CheckpointError`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} where an object belongs")
    except PermissionError:
        raise unreadable(file) from None
    except RecursionError:
        raise CheckpointError(
            f"{file} cannot be read (it is nested too deep): fetch it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from None
    return value


def unreadable(file: Path) -> CheckpointError:
    """The error for a file that is there and may not be opened."""
    return CheckpointError(f"{file} may not be read by this user: change its permissions")


def check_streams() -> None:
    """Make the standard streams ones that can be used; what is closed is None in Python.

    A file that is opened later would take the number of a closed one, and what C libraries print.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        raise OffloadError("stdout is closed: there is nowhere to write to, open it")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sign its encoding lacks ends no answer


def give_up_unwritable() -> list[TextIO]:
    """Those of stdout and stderr that cannot be written; what they still hold is thrown away.

    Python would try again when it ends, and complain.
    """
    given_up = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            given_up.append(stream)
    return given_up
