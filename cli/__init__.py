"""The `offload` command: one file a command.

Knows: flags, what goes to stdout and what to stderr, exit codes. Does not know: tensors. What needs
torch is imported by the command that uses it, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from cli.exit_codes import INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        from cli.entry import run
    except KeyboardInterrupt:
        return INTERRUPTED
    return run(argv)


__all__ = ["main"]
