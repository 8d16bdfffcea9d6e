"""The root of the project's errors, and those about bytes on disk; `offload.errors` has more."""


class OffloadError(Exception):
    """Base of every error this project raises on purpose; the message ends with the remedy."""


class PackError(OffloadError):
    """A pack is incomplete, damaged, of another version, or cannot be written."""
