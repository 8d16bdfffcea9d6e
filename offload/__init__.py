"""Run Mixture-of-Experts models whose experts do not fit: `load`, `generate`, `stream_generate`."""

from offload.errors import (
    BudgetError,
    CheckpointError,
    GenerationError,
    OffloadError,
    PackError,
    SourceError,
    UnsupportedModelError,
)
from offload.generation import GenerationResponse, generate, stream_generate
from offload.load import load
from offload.version import __version__



__all__ = [
    "BudgetError",
    "CheckpointError",
    "GenerationError",
    "GenerationResponse",
    "OffloadError",
    "PackError",
    "SourceError",
    "UnsupportedModelError",
    "__version__",
    "generate",
    "load",
    "stream_generate",
]
