"""What can go wrong, by kind. Every message says what was wrong, where, and what to do.

Knows: also how an error that is not ours is told in one line. Does not know: where it is printed.
"""

from __future__ import annotations

from offload.lines import printable
from offload.quant.errors import OffloadError, PackError


class SourceError(OffloadError):
    """There is no such model or file, or it may not be used as asked."""


class CheckpointError(OffloadError):
    """A checkpoint is damaged, unsafe, or lacks a tensor."""


class UnsupportedModelError(OffloadError):
    """The model has no experts, or has them where transformers' experts seam does not reach."""


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


NO_MEMORY = "lower --expert-slots, --ctx-size or --expert-bits"
LONGEST = 1000  # characters of a line: what a file holds may be quoted in it


def one_line(error: BaseException) -> str:
    """`error` as one line for the user."""
    if isinstance(error, OffloadError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error}: is the place readable and writable? OFFLOAD_HOME names another"
    elif is_memory(error):
        text = f"out of memory: {NO_MEMORY}"
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        text = f"out of GPU memory: {NO_MEMORY}"
    else:
        text = f"{type(error).__name__}: {error} (a bug: --debug shows where)"
    return shortened(printable(" ".join(text.split())))


def is_memory(error: BaseException) -> bool:
    """Whether the system refused memory, as Python, torch, threads and Rust's libraries say it."""
    words = ("can't allocate memory", "can't start new thread")
    return (
        isinstance(error, MemoryError)
        or any(word in str(error) for word in words)
        or type(error).__name__ == "PanicException"
    )


def shortened(text: str) -> str:
    """`text` without its middle when it is very long."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def reason(error: BaseException) -> str:
    """What `error` of another library says, in one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


__all__ = [
    "BudgetError",
    "ChatError",
    "CheckpointError",
    "GenerationError",
    "OffloadError",
    "PackError",
    "QualityError",
    "RecipeError",
    "SourceError",
    "TransferError",
    "UnsupportedModelError",
    "one_line",
    "reason",
    "shortened",
]
