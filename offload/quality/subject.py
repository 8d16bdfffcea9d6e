"""Which model was measured, and as what it was run.

Knows: what two runs must have in common to be comparable. Does not know: figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from offload.engine.handle import Offload


@dataclass(frozen=True)
class Subject:
    """A model by its name and shape, and the settings it was run with."""

    name: str
    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    settings: dict[str, Any]  # bits, dtype, device: these may change

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for figures to be comparable."""
        return {name: value for name, value in self.to_json().items() if name != "settings"}


def subject_of(model: PreTrainedModel, source: str) -> Subject:
    """`model`, loaded from `source`. Of a pack, the name is that of what it was made from."""
    text = model.config.get_text_config()
    handle = getattr(model, "offload", None)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "runner": "transformers",
    }
    if isinstance(handle, Offload):
        info = handle.pack.info
        source = info.source
        settings["runner"] = "offload"
        settings["bits"] = info.bits
    return Subject(
        name=source,
        model_type=model.config.model_type,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocabulary=text.vocab_size,
        settings=settings,
    )
