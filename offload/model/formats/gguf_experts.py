"""Which of a GGUF file's tensors make the parameters of an experts module.

Knows: llama.cpp's names for experts' projections, together or one by one, and how transformers'
modules put them together. Does not know: how tensors are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload.errors import CheckpointError
from offload.model.formats.gguf_part import GgufFile

_LAYER = re.compile(r"layers\.(\d+)\.")
_PROJECTIONS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}

Parts = tuple[tuple[str, ...], ...]  # for each projection one tensor, or one for each expert


@dataclass(frozen=True)
class Arrangement:
    """How a module has one of its parameters, whose projections GGUF has apart as [out, in]."""

    transposed: bool  # [in, out]
    interleaved: bool  # gate and up alternate

    @classmethod
    def of(cls, module: nn.Module, parameter: str) -> Arrangement:
        both = parameter.startswith("gate_up")
        return cls(
            bool(module.is_transposed), both and not getattr(module, "is_concatenated", True)
        )

    def arrange(self, value: Tensor) -> Tensor:
        """One expert's projections [out, in] one after the other, or their biases [out]."""
        if self.interleaved:
            value = torch.stack(value.chunk(2), dim=1).flatten(0, 1)
        return value.t() if self.transposed and value.dim() == 2 else value


def expert_parts(
    file: GgufFile, name: str, shape: tuple[int, ...], arrangement: Arrangement
) -> Parts:
    """The tensors that make the parameter `name` [experts, ...]; none when one is missing.

    Raises `CheckpointError` for tensors of other shapes.
    """
    layer = _LAYER.search(name)
    parameter = name.rpartition(".")[2]
    suffix = "bias" if parameter.endswith("_bias") else "weight"
    projections = _PROJECTIONS[parameter.removesuffix("_bias")]
    if layer is None:
        return ()
    stem = f"blk.{layer[1]}.ffn_"
    fused = f"{stem}gate_up_exps.{suffix}"
    if len(projections) == 2 and fused in file.tensors:
        parts: Parts = ((fused,),)
    else:
        parts = tuple(_projection(file, stem + p, suffix, shape[0]) for p in projections)
    if not all(parts):
        return ()
    one = shape[:0:-1] if arrangement.transposed else shape[1:]
    wanted = (one[0] // len(parts), *one[1:])
    for part in parts:
        for tensor in part:
            stored = file.shape(tensor)
            if stored != (wanted if len(part) > 1 else (shape[0], *wanted)):
                raise CheckpointError(
                    f"{tensor} has shape {stored}, which does not fit {name} {shape}: the file's "
                    "metadata and weights do not match"
                )
    return parts


def _projection(file: GgufFile, stem: str, suffix: str, experts: int) -> tuple[str, ...]:
    """One tensor of all experts, or in files before April 2024 one for each."""
    if f"{stem}_exps.{suffix}" in file.tensors:
        return (f"{stem}_exps.{suffix}",)
    found = 0  # counted before names are made: metadata may ask for any number of experts
    while f"{stem}.{found}.{suffix}" in file.tensors:
        found += 1
    return tuple(f"{stem}.{e}.{suffix}" for e in range(found)) if found == experts else ()
