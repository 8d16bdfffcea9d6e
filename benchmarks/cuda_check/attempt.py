"""One figure's failure, kept from taking the others with it.

Knows: how a failure is told in one line. Does not know: what is measured.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Part


class NotBuiltError(Exception):
    """This version of the program does not have it (yet)."""


class NoTimeError(Exception):
    """Other figures were dearer than thought."""


@contextmanager
def attempt(part: Part, what: str) -> Iterator[None]:
    """Note what goes wrong inside, and go on."""
    try:
        yield
    except NotBuiltError as error:
        part.note(f"{what}: not built ({error})")
    except NoTimeError as error:
        part.note(f"{what}: left out ({error})")
    except Exception as error:  # whatever a kernel, a driver or a library raises
        part.note(f"{what}: FAILED, {reason(error)}")


def reason(error: Exception) -> str:
    """What went wrong and where, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


def need_time(setting: Setting, seconds: float) -> None:
    """Raise `NoTimeError` where less is left."""
    if setting.seconds_left < seconds:
        raise NoTimeError(f"{max(0.0, setting.seconds_left):.0f} s left, it needs {seconds:.0f}")
