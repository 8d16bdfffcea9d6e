"""The standard streams of a command, when they are closed, full, or nobody reads them any more.

Knows: what Python makes of such streams. Does not know: what is written.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from offload.quant.errors import OffloadError


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
