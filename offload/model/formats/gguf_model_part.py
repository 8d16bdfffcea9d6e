"""A GGUF file's tensors as a transformers model names and arranges them.

Knows: which tensor of llama.cpp is which parameter, and what its converter did to it. Does not
know: blocks (`gguf`), config values (`gguf_config`), experts' tensors (`gguf_experts`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.errors import CheckpointError, UnsupportedModelError
from offload.model.formats.gguf_architecture import architecture_of
from offload.model.formats.gguf_experts import Arrangement, Parts, expert_parts
from offload.model.formats.gguf_model import layers_of
from offload.model.formats.gguf_part import GgufFile, library
from offload.model.seam import is_experts_module

_LAYER = re.compile(r"layers\.(\d+)\.")
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class _Made:
    """How a parameter is made from tensors of the file."""

    shape: tuple[int, ...]
    parts: Parts  # of an expert parameter, for each projection; else one of one tensor
    experts: Arrangement | None = None
    heads: int = 0  # whose rows llama.cpp put in another order (its rotary embedding's)


class GgufSource:
    """A GGUF file as a source of `model`'s parameters, under the model's own names."""

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        """Raises `CheckpointError`; `UnsupportedModelError` for tensors that have no place."""
        self._file = file
        self._architecture = architecture_of(file)
        self._config = model.config
        self._made: dict[str, _Made] = {}
        experts = {
            f"{name}.{parameter}": Arrangement.of(module, parameter)
            for name, module in model.named_modules()
            if is_experts_module(module)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        gguf = library()
        kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[self._architecture.name]
        names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
        for name, value in model.state_dict().items():
            shape = tuple(value.shape)
            if name in experts:
                if parts := expert_parts(file, name, shape, experts[name]):
                    self._made[name] = _Made(shape, parts, experts[name])
            elif made := self._parameter(name, shape, names):
                self._made[name] = made
        self._check_all_used()

    def names(self) -> list[str]:
        return list(self._made)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._made[name].shape

    def dtype(self, name: str) -> torch.dtype:
        dtypes = [self._file.dtype(t) for part in self._made[name].parts for t in part]
        return functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str) -> Tensor:
        made = self._made[name]
        if made.experts is not None:
            return torch.cat([self.read_slice(name, index) for index in range(made.shape[0])])
        value = self._file.read(made.parts[0][0]).reshape(made.shape)
        return _natural_rows(value, made.heads) if made.heads else value

    def read_slice(self, name: str, index: int) -> Tensor:
        made = self._made[name]
        if made.experts is None:
            return self.read(name)[index : index + 1]
        parts = [
            self._file.read(part[index]) if len(part) > 1 else self._file.read_slice(part[0], index)
            for part in made.parts
        ]
        return made.experts.arrange(torch.cat(parts)).unsqueeze(0)

    def _parameter(self, name: str, shape: tuple[int, ...], names: object) -> _Made | None:
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, ""
        found = names.get_name(stem)  # type: ignore[attr-defined]
        layer = _LAYER.search(name)
        if found is None and layer is not None:  # what the library's map leaves out
            known = {"router": "ffn_gate_inp", "e_score_correction_bias": "exp_probs_b.bias"}
            last = stem.rpartition(".")[2]
            found = f"blk.{layer[1]}.{known[last]}" if last in known else None
        candidates = [f"{found}.{suffix}", f"{found}.weight", found] if found else []
        tensor = next((c for c in candidates if c in self._file.tensors), None)
        if tensor is None:
            return None  # tied, or missing: the checkpoint knows
        stored = self._file.shape(tensor)
        if [n for n in stored if n > 1] != [n for n in shape if n > 1]:
            raise CheckpointError(
                f"{tensor} has shape {stored} where the model asks for {shape}: the file's "
                "metadata and weights do not match"
            )
        heads = 0
        if self._architecture.permuted and re.search(r"\.attn_[qk]\.", tensor):
            query = ".attn_q." in tensor
            config = self._config
            heads = config.num_attention_heads if query else config.num_key_value_heads
            if shape[0] % (2 * heads):
                raise CheckpointError(
                    f"{tensor} has {shape[0]} rows, not pairs for {heads} heads: the file's "
                    "metadata and weights do not match"
                )
        return _Made(shape, ((tensor,),), heads=heads)

    def _check_all_used(self) -> None:
        used = {t for made in self._made.values() for part in made.parts for t in part}
        layers = layers_of(self._file)
        for name in self._file.tensors:
            block = _BLOCK.match(name)
            behind = block is not None and int(block[1]) >= layers  # predicts further tokens
            if name not in used and not behind:
                raise UnsupportedModelError(
                    f"{self._file.path} has a tensor {name} that {self._config.model_type!r} in "
                    "transformers has no place for: use its safetensors checkpoint"
                )


def _natural_rows(weight: Tensor, heads: int) -> Tensor:
    """Undo the order that llama.cpp's converter gives the rows of each head: pairs that rotate
    together lie side by side there, half a head apart in transformers."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)
