"""The root of the project's errors, and those about bytes on disk.

Knows: which failures a user can cause or meet, and that each message says what was wrong, where,
and what to do. Does not know: how a command prints them (`cli`), nor failures of the runtime
(`offload.errors`, which re-exports these).
"""


class OffloadError(Exception):
    """Base of every error this project raises on purpose; the message ends with the remedy."""


class PackError(OffloadError):
    """A pack is incomplete, damaged, of another version, or cannot be written."""
