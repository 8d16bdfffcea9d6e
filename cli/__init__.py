"""The `offload` command: one file a command.

Knows: flags, what goes to stdout and what to stderr, exit codes. Does not know: tensors. What needs
torch is imported by the command that uses it, so that `--help` answers at once.
"""

from cli.entry import main

__all__ = ["main"]
