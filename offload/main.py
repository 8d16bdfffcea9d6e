"""The program `offload`: Ctrl-C ends it with exit code 130 at any time, its imports included."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from offload.errors import INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the program's arguments) names.

    Returns its exit code.
    """
    try:
        from offload.commands import run  # imported here because Ctrl-C may come meanwhile

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
