"""Run Mixture-of-Experts models whose experts do not fit: `load`, `generate`, `stream_generate`.

Each name is imported when it is first used, so that `offload --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from offload.errors import (
    BudgetError,
    CheckpointError,
    GenerationError,
    QualityError,
    RecipeError,
    SourceError,
    UnsupportedModelError,
)
from offload.quant.errors import OffloadError, PackError
from offload.version import __version__

if TYPE_CHECKING:
    from offload.generation.batch import generate
    from offload.generation.stream import GenerationResponse, stream_generate
    from offload.loading import load

__all__ = [
    "BudgetError",
    "CheckpointError",
    "GenerationError",
    "GenerationResponse",
    "OffloadError",
    "PackError",
    "QualityError",
    "RecipeError",
    "SourceError",
    "UnsupportedModelError",
    "__version__",
    "generate",
    "load",
    "stream_generate",
]

_LATER = {
    "GenerationResponse": "offload.generation.stream",
    "generate": "offload.generation.batch",
    "load": "offload.loading",
    "stream_generate": "offload.generation.stream",
}


def __dir__() -> list[str]:
    """The public names only, so that completion does not offer modules."""
    return sorted(__all__)


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module 'offload' has no attribute {name!r}")
        from offload.quick import without_hqq

        with without_hqq():
            return getattr(importlib.import_module(_LATER[name]), name)
