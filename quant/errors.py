"""The base class of the project's errors, and the error about packs.

`offload.errors` has the other errors.
"""


class OffloadError(Exception):
    """Base of every error this project raises on purpose; the message ends with the remedy."""


class PackError(OffloadError):
    """A pack is incomplete, damaged, of another version, or cannot be written."""
