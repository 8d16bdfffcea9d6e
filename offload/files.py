"""Reads what users name, writes files whole or not at all, and takes care of standard streams."""

import contextlib
import io
import json
import logging
import os
import select
import stat
import sys
from errno import EIO, ELOOP, ENAMETOOLONG, ENOSPC
from pathlib import Path
from typing import Any, TextIO

from offload.errors import CheckpointError, SourceError
from offload.quant.errors import OffloadError

logger = logging.getLogger("offload")
MOST_CHARACTERS = 2**24  # in a prompt; more than any context holds, but little beside any RAM
TRACE, TIMELINE, PICTURE, BASELINE = "routing trace", "timeline", "picture", "baseline"
# Kind of file -> bytes that each of ours has near its beginning or its end.
MARKS = {
    TRACE: b"offload-trace",
    TIMELINE: b'"moe-offload":',
    PICTURE: b"drawn by moe-offload",
    BASELINE: b"moe-offload quality baseline",
}
PATIENCE = 2.0  # seconds without text on stdin until the user is told
ENDS = 2**16  # bytes of a file's beginning, and of its end, in which a mark is looked for


def read_text(file: TextIO, name: str) -> str:
    """The text in `file`, which messages call `name`. Raises `SourceError` if it is not text."""
    try:
        text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise SourceError(f"cannot read {name}: {error.strerror or error}") from None
    if len(text) > MOST_CHARACTERS:
        raise SourceError(f"{name} has more than {MOST_CHARACTERS} characters: give a shorter one")
    return text


def asked_text(file: Path | None, what: str) -> str:
    """The text in `file`, or on stdin if that is None; messages call it the `what`.

    Raises `SourceError`.
    """
    if file is None:
        return read_text(sys.stdin, f"the piped {what}")
    try:
        with user_path(file).open(encoding="utf-8-sig") as handle:
            return read_text(handle, f"the {what} in {file}")
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"cannot read the {what} from {file}: {reason}") from None


def has_piped() -> bool:
    """Whether stdin is a pipe or a file, which may hold text, and not a terminal or a device."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # a closed stdin, or one that Python code has put there
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def piped_text(what: str) -> str:
    """The text on stdin, which messages call the `what`. Raises `OffloadError`.

    A line on stderr says so while nothing comes, because a script may have left its stdin open.
    """
    with contextlib.suppress(OSError, ValueError):  # Windows cannot wait for a pipe
        if not select.select([sys.stdin], [], [], PATIENCE)[0]:
            print(
                f"waiting for the {what} on stdin (if there is none: < /dev/null)", file=sys.stderr
            )
    return asked_text(None, what)


def user_path(text: str | Path) -> Path:
    """The path that a user wrote, with `~` replaced. Raises `SourceError` if it cannot be one."""
    if not str(text).strip():  # Python would take an empty name for the current folder
        raise SourceError("a name is empty: give the name of a file, a folder or a model")
    try:
        path = Path(text).expanduser()
        path.lstat()
    except RuntimeError:  # there is no such user, or their home is unknown
        raise SourceError(
            f"{text}: that home folder is not known: write the path out, or set OFFLOAD_HOME"
        ) from None
    except ValueError as error:
        raise SourceError(f"{str(text)!r} is not a path ({error}): correct it") from None
    except OSError as error:  # whoever opens the file reports that it is missing or unreadable
        if error.errno in (ELOOP, ENAMETOOLONG):
            raise SourceError(f"{text} is not a path ({error.strerror}): correct it") from None
    return path


def check_readable(file: str | Path | None) -> None:
    """Raise `SourceError` now if `file`, which a user named, cannot be opened; None is none."""
    try:
        if file is not None:
            user_path(file).open("rb").close()
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}") from None


def check_output(file: str | Path | None, kind: str) -> None:
    """Check that `file`, unless it is None, can become a `kind` of file, without changing anything.

    Raises `OffloadError` if it cannot be written, or if it is anything but an earlier file of the
    same kind, of which `MARKS` lists all.
    """
    if file is None:
        return
    path = user_path(file)
    try:
        exists = path.exists()
        if exists and not path.is_file():  # a folder, a device or a pipe
            raise OffloadError(f"{file} is not a file: name one for the {kind}")
        with path.open("ab"):
            pass
        if not exists:
            path.resolve().unlink()  # a link that led nowhere does so again
        elif path.stat().st_size and MARKS[kind] not in _ends_of(path):
            raise OffloadError(
                f"{file} exists and was not written as a {kind}: choose another file, or move it "
                "away"
            )
    except OSError as error:
        raise _unwritable(file, kind, error) from None


def _unwritable(file: str | Path, kind: str, error: OSError) -> OffloadError:
    reason = error.strerror or error
    return OffloadError(f"cannot write the {kind} to {file} ({reason}): name another file")


def _ends_of(file: Path) -> bytes:
    """The beginning and the end of `file`, where `MARKS` are."""
    with file.open("rb") as handle:
        begin = handle.read(ENDS)
        handle.seek(max(0, file.stat().st_size - ENDS))
        return begin + handle.read()


def tell_replaced(file: Path, kind: str) -> None:
    """Log that `file` is about to be replaced, if there is something in it."""
    if file.is_file() and file.stat().st_size:
        logger.warning("the earlier %s in %s is replaced", kind, file)


def write_output(file: Path, kind: str, data: bytes) -> None:
    """Replace `file`, which passed `check_output`, by `data` in one step. Raises `OffloadError`."""
    path = user_path(file).resolve()
    tell_replaced(path, kind)
    try:
        write_whole(path, data)
    except OSError as error:
        raise _unwritable(file, kind, error) from None


def write_whole(file: Path, data: bytes) -> None:
    """Replace `file` by `data` in one step: at any moment it holds its old bytes or `data`.

    If two processes write it, the later one wins. Unfinished files of killed processes are removed.
    Raises `OSError`.
    """
    import psutil  # imported here because every --help imports this file

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


def existing(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def short(path: Path) -> str:
    """`path` as people write it, with `~` for the home folder."""
    home = os.path.expanduser("~")  # noqa: PTH111  # `Path.home` fails where it is unknown
    return str(Path("~", path.relative_to(home)) if path.is_relative_to(home) else path)


def offload_home() -> Path:
    """`$OFFLOAD_HOME`, else `$XDG_CACHE_HOME/offload`, else `~/.cache/offload`."""
    if home := os.environ.get("OFFLOAD_HOME"):
        return user_path(home)
    cache = os.environ.get("XDG_CACHE_HOME")
    return user_path(cache or "~/.cache") / "offload"


def packs_folder(pack_dir: str | Path | None = None) -> Path:
    """The folder that packs are kept in: `pack_dir`, else one in `offload_home`."""
    return user_path(pack_dir) if pack_dir else offload_home() / "packs"


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `CheckpointError`."""
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
    """The error for a file that exists but may not be opened."""
    return CheckpointError(f"{file} may not be read by this user: change its permissions")


def check_streams() -> None:
    """Replace closed standard streams, which are None in Python, by the null device.

    Otherwise a file that is opened later gets a closed stream's number, and C libraries print into
    it. Raises `OffloadError` if stdout is closed.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        raise OffloadError("stdout is closed: redirect it to a file or a terminal")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the encoding of stdout lacks must not end an answer.
        sys.stdout.reconfigure(errors="replace")


def came_from_stdout(error: OSError) -> bool:
    """Whether `error` was raised because stdout cannot be written, whose rest is then discarded."""
    # With `python -u` there is no buffer, which would fail again.
    unbuffered = isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase)
    nameless = error.filename is None and error.errno in (ENOSPC, EIO)
    return sys.stdout in give_up_unwritable() or (unbuffered and nameless)


def give_up_unwritable() -> list[TextIO]:
    """Discard the buffers of stdout and stderr if they cannot be written; return these streams.

    Otherwise Python would try again to write the buffers when it ends, and print an error.
    """
    given_up = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            given_up.append(stream)
    return given_up
