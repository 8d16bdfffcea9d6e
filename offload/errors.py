"""The errors that users meet, each with a remedy in its message, and the exit codes."""

from offload.quant.errors import OffloadError


class SourceError(OffloadError):
    """There is no such model or file, or it may not be used as asked."""


class CheckpointError(OffloadError):
    """A checkpoint is damaged, unsafe, or lacks a tensor."""


class UnsupportedModelError(OffloadError):
    """The model has no experts, or has them where transformers' experts seam does not reach."""


class OptionError(OffloadError, TypeError):
    """An option that does not exist, or a value that it cannot have."""


class RecipeError(OffloadError):
    """Bits, groups or rules that do not exist."""


class BudgetError(OffloadError):
    """Too little memory for what was asked."""


class QualityError(OffloadError):
    """A text, reference or baseline that quality cannot be measured with."""


class GenerationError(OffloadError):
    """A prompt or a sampling parameter that cannot be used, or a model that says nothing usable."""


class TransferError(OffloadError):
    """Experts can no longer be copied into their slots."""


class ChatError(OffloadError):
    """A command of a chat that cannot be carried out."""


DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes of every command
NO_MEMORY = "lower --expert-slots, --ctx-size or --expert-bits"
