"""What can go wrong with what a user hands to the cache; messages end with the remedy.

Knows: nothing. Does not know: the runtime's errors (`offload` turns these into its own).
"""


class CacheError(ValueError):
    """A policy, an allocation, a predictor or a number that cannot be used."""


class TraceError(CacheError):
    """A file is not a trace, or is damaged."""
