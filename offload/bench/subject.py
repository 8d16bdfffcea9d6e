"""What was measured, and where: model, bits, settings, hardware.

Knows: which facts make two rows comparable. Does not know: figures (`result`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from offload.chat.report import bits_name
from offload.engine.handle import offload_of
from offload.machine.processor import processor_name
from offload.version import __version__


@dataclass(frozen=True)
class Subject:
    """The part of a row that its tests share; llama-bench's names where it has them."""

    build: str
    cpu_info: str
    gpu_info: str
    backends: str
    n_threads: int
    model: str
    model_type: str
    model_size: int  # bytes of the pack
    model_n_params: int
    bits: str
    policy: str
    lookahead: bool | None  # None: while it pays; on the device as True
    text: str  # "real" or "random"

    @classmethod
    def of(cls, model: PreTrainedModel, *, random: bool) -> Subject:
        """Of a loaded model."""
        offload = offload_of(model)
        device = offload.options.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(
            build=__version__,
            cpu_info=processor_name(),
            gpu_info=gpu,
            backends=device.type.upper(),
            n_threads=torch.get_num_threads(),
            model=offload.pack.info.source,
            model_type=str(model.config.model_type),
            model_size=offload.pack.total_bytes,
            model_n_params=offload.pack.parameters,
            bits=bits_name(offload.pack.info),
            policy=offload.options.policy,
            lookahead=offload.options.lookahead,
            text="random" if random else "real",
        )

    @property
    def name(self) -> str:
        """The model and its bits."""
        return f"{self.model} {self.bits}"

    @property
    def lookahead_name(self) -> str:
        return {True: "on", False: "off", None: "auto"}[self.lookahead]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
