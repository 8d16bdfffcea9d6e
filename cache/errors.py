"""Errors about what a user hands to the cache; each message ends with the remedy."""


class CacheError(ValueError):
    """A name or a number that cannot be used."""


class TraceError(CacheError):
    """A file is not a trace, or is damaged."""
