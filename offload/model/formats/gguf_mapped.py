"""GGUF architectures that transformers has rules for: config and tensors by those rules.

Knows: transformers.integrations.gguf (`get_gguf_config`, `get_gguf_conversion_mapping`), for
models whose converter changes more than names, such as Qwen3.5. Does not know: what the rules do.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from offload.errors import CheckpointError, UnsupportedModelError, reason
from offload.model.formats.gguf_part import GgufFile

try:
    from transformers.integrations import gguf as rules
except ImportError:  # transformers before 5.2x has none
    rules = None
_DROPPED = "mtp."  # multi-token prediction, which transformers' models leave out


def has_rules(file: GgufFile) -> bool:
    """Whether transformers has rules for this file's architecture."""
    name = file.fields.get("general.architecture")
    return rules is not None and name in rules.GGUF_CONFIG_ARCHS and name in rules.GGUF_ARCHS


def mapped_config(file: GgufFile) -> PreTrainedConfig:
    """The config by transformers' rules. Raises `CheckpointError`."""
    try:
        values = rules.get_gguf_config(file.fields, tuple(file.tensors))
        config: PreTrainedConfig = CONFIG_MAPPING[values["model_type"]](**values)
    except Exception as error:  # whatever the rules and a config class raise on odd metadata
        raise CheckpointError(
            f"{file.path} has unusable metadata ({reason(error)}): fetch it again"
        ) from None
    return config


class MappedSource:
    """A GGUF file as a source of `model`'s parameters, by transformers' rules."""

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        """Raises `UnsupportedModelError` for tensors that have no place."""
        self._file = file
        self._config = model.config
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        architecture = file.fields["general.architecture"]
        mapping = rules.get_gguf_conversion_mapping(architecture, model.config)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        self._converters: dict[str, WeightConverter | None] = {}
        self._tensors: dict[str, dict[str, str]] = defaultdict(dict)  # by pattern
        for name in file.tensors:
            target, pattern = rename_source_key(name, renamings, converters)
            if target.startswith(_DROPPED):
                continue
            if target not in self._shapes:
                raise UnsupportedModelError(
                    f"{file.path} has a tensor {name} that {model.config.model_type!r} in "
                    "transformers has no place for: use its safetensors checkpoint"
                )
            self._converters[target] = of_pattern.get(pattern)
            self._tensors[target][pattern or name] = name

    def names(self) -> list[str]:
        return list(self._converters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        dtypes = [self._file.dtype(tensor) for tensor in self._tensors[name].values()]
        return functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str) -> Tensor:
        return self._convert(name, {p: self._file.read(t) for p, t in self._tensors[name].items()})

    def read_slice(self, name: str, index: int) -> Tensor:
        """The rules join the parts of experts along other dimensions than the experts'."""
        if len(self._shapes[name]) != 3 or ".experts." not in name:
            return self.read(name)[index : index + 1]
        parts = {
            pattern: self._file.read_slice(tensor, index).unsqueeze(0)
            for pattern, tensor in self._tensors[name].items()
        }
        return self._convert(name, parts)

    def _convert(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        converter = self._converters[name]
        if converter is None:
            return next(iter(tensors.values()))
        converter = deepcopy(converter)
        for pattern, tensor in tensors.items():
            converter.collected_tensors[pattern] = [tensor]
        try:
            made: Any = converter.convert(name, model=None, config=self._config)[name]
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"transformers' rule for {name} failed on {self._file.path} ({reason(error)}): the "
                "file's metadata and weights do not match"
            ) from None
        return (made[0] if isinstance(made, list) else made).contiguous()  # type: ignore[no-any-return]
