"""Where this program keeps its files, and the paths a user names.

Knows: which names are no paths. Does not know: what is there.
"""

from __future__ import annotations

import os
from errno import ELOOP, ENAMETOOLONG
from pathlib import Path

from offload.errors import OffloadError


def offload_home() -> Path:
    """`$OFFLOAD_HOME`, else `$XDG_CACHE_HOME/offload`, else `~/.cache/offload`."""
    if home := os.environ.get("OFFLOAD_HOME"):
        return user_path(home)
    cache = os.environ.get("XDG_CACHE_HOME")
    return user_path(cache or "~/.cache") / "offload"


def user_path(text: str | Path) -> Path:
    """The path a user wrote, `~` replaced. Raises `OffloadError` when it cannot be one."""
    try:
        path = Path(text).expanduser()
        path.lstat()
    except RuntimeError:  # there is no such user, or nobody knows their home
        raise OffloadError(
            f"{text}: that home folder is not known: write the path out, or set OFFLOAD_HOME"
        ) from None
    except ValueError as error:
        raise OffloadError(f"{str(text)!r} is no path ({error}): correct it") from None
    except OSError as error:  # that it is not there, or not to be read, is for those who use it
        if error.errno in (ELOOP, ENAMETOOLONG):
            raise OffloadError(f"{text} is no path ({error.strerror}): correct it") from None
    return path
