"""What can go wrong, by kind. Every message says what was wrong, where, and what to do."""

from __future__ import annotations

from quant.errors import OffloadError, PackError


class SourceError(OffloadError):
    """There is no such model, or it may not be used as asked."""


class CheckpointError(OffloadError):
    """A checkpoint is damaged, unsafe, or lacks a tensor."""


class UnsupportedModelError(OffloadError):
    """The model has no experts, or has them where transformers' experts seam does not reach."""


class RecipeError(OffloadError):
    """Bits, groups or rules that do not exist."""


class BudgetError(OffloadError):
    """Too little memory for what was asked."""


class GenerationError(OffloadError):
    """A prompt or a sampling parameter that cannot be used."""


__all__ = [
    "BudgetError",
    "CheckpointError",
    "GenerationError",
    "OffloadError",
    "PackError",
    "RecipeError",
    "SourceError",
    "UnsupportedModelError",
]
