"""The base class of the project's errors, and the error about packs.

`offload.errors` has the other errors.
"""

from collections.abc import Callable
from typing import ClassVar


class OffloadError(Exception):
    """Base of every error this project raises on purpose; the message ends with the remedy."""

    # Messages name options by their flags. This makes of them what the reader writes: `load` puts
    # `offload.keywords.in_keywords` here, and a command puts `str`.
    reworded: ClassVar[Callable[[str], str]] = str

    def __str__(self) -> str:
        return OffloadError.reworded(super().__str__())


class PackError(OffloadError):
    """A pack is incomplete, damaged, of another version, or cannot be written."""
