"""Gives a GGUF file's tensors as the parameters of a transformers model, under the model's names.

The rules of `transformers.integrations.gguf` say how, for the architectures it has. The rules for
`ARCHITECTURES` are made here of the same parts, because transformers has none for them.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    Interleave,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.integrations.gguf import get_gguf_conversion_mapping
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    ConcatenateRows,
    PermuteRows,
)

from offload.errors import CheckpointError, UnsupportedModelError
from offload.lines import reason
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_config import ARCHITECTURES, has_rules
from offload.model.seam import experts_modules

_NAMES = {  # in a layer: llama.cpp's name -> transformers', beyond DENSE_DECODER_RENAMINGS
    "attn_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "post_attention_norm.": "post_attention_layernorm.",
    "attn_q_norm.": "self_attn.q_norm.",
    "attn_k_norm.": "self_attn.k_norm.",
    "attn_sinks.weight": "self_attn.sinks",
    "exp_probs_b.bias": "mlp.e_score_correction_bias",
    "ffn_gate_inp.": "mlp.gate.",
    "ffn_gate_inp_shexp.": "mlp.shared_expert_gate.",
    "ffn_gate_shexp.": "mlp.shared_expert.gate_proj.",
    "ffn_up_shexp.": "mlp.shared_expert.up_proj.",
    "ffn_down_shexp.": "mlp.shared_expert.down_proj.",
}
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
_ONE_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d{1,9})\.")


class TransposedView(ConversionOps):  # type: ignore[misc]
    """Swaps rows and columns without a copy, so that an expert [out, in] stays contiguous.

    Quantising adds numbers in the order of memory, and a pack's bytes depend on that order.
    """

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any
    ) -> dict[str, Tensor]:
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        return {target_patterns[0]: tensor.transpose(1, 2)}


def _transforms(file: GgufFile, model: PreTrainedModel) -> list[WeightTransform]:
    """How `file`'s tensors become `model`'s parameters, as transformers describes it."""
    architecture = file.fields["general.architecture"]
    if has_rules(file):
        theirs: list[WeightTransform] = get_gguf_conversion_mapping(architecture, model.config)
        return theirs
    known = ARCHITECTURES[architecture]
    experts = next(iter(experts_modules(model)), None)
    names = {**_NAMES, **known.names}
    block = names["ffn_gate_inp."].partition(".")[0]  # the module that has the router and experts
    for projection in ("gate", "up", "gate_up", "down"):
        for suffix, end in (("weight", ""), ("bias", "_bias")):
            target = f"{block}.experts.{projection}_proj{end}"
            names[f"ffn_{projection}_exps.{suffix}"] = target
    transforms = [
        WeightRenaming(r"^output_norm\.", "model.norm."),
        *DENSE_DECODER_RENAMINGS,
        *(WeightRenaming(rf"\.{re.escape(ours)}", f".{theirs}") for ours, theirs in names.items()),
    ]
    if known.permuted:
        text = model.config.get_text_config()
        for letter, heads in (("q", text.num_attention_heads), ("k", text.num_key_value_heads)):
            target = f"self_attn.{letter}_proj."
            rows = model.get_parameter(f"model.layers.0.{target}weight").shape[0]
            # Two numbers of a head that rotate together lie side by side in the file, and half a
            # head apart in transformers.
            order = torch.arange(rows, device="cpu").view(heads, -1, 2).transpose(1, 2).flatten()
            source = target.replace(".", r"\.")
            transforms.append(WeightConverter(source, target, [PermuteRows(order)]))
    turned = [TransposedView()] if getattr(experts, "is_transposed", False) else []
    alternating = [] if getattr(experts, "is_concatenated", True) else [Interleave(1, inverse=True)]
    if turned:
        transforms.append(WeightConverter(r"\.experts.down_proj", ".experts.down_proj", turned))
    for end, operations in (("", [*alternating, *turned]), ("_bias", alternating)):
        for parts in (["gate", "up"], ["gate_up"]):
            sources = [rf"\.experts.{part}_proj{end}" for part in parts]
            joined = [ConcatenateRows(dim=1), *operations]
            transforms.append(WeightConverter(sources, f".experts.gate_up_proj{end}", joined))
    return transforms


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file, or one for each expert (in files before April 2024)."""

    names: tuple[str, ...]
    apart: bool

    def read(self, file: GgufFile) -> Tensor:
        return torch.stack([*map(file.read, self.names)]) if self.apart else file.read(*self.names)

    def read_slice(self, file: GgufFile, index: int) -> Tensor:
        if self.apart:
            return file.read(self.names[index]).unsqueeze(0)
        return file.read_slice(self.names[0], index)

    def shape(self, file: GgufFile) -> tuple[int, ...]:
        shape = file.shape(self.names[0])
        return (len(self.names), *shape) if self.apart else shape


def _stored(file: GgufFile) -> dict[str, _Stored]:
    """The file's tensors by the names they have where all experts of a layer are in one tensor.

    Raises `CheckpointError` where one of the experts is missing or has another shape.
    """
    found = {}
    of_experts: dict[str, dict[int, str]] = defaultdict(dict)
    for name in file.tensors:
        if (match := _ONE_EXPERT.match(name)) is None:
            found[name] = _Stored((name,), apart=False)
        else:
            of_experts[f"{match[1]}_exps.{name[match.end() :]}"][int(match[2])] = name
    for whole, numbered in of_experts.items():
        names = tuple(numbered[number] for number in sorted(numbered))
        shapes = {file.shape(name) for name in names}
        if whole in found or sorted(numbered) != [*range(len(names))] or len(shapes) > 1:
            raise CheckpointError(
                f"the experts {names[0]} to {names[-1]} in {file.path} are not one series of equal "
                "tensors: fetch it again"
            )
        found[whole] = _Stored(names, apart=True)
    return found


class GgufSource:
    """A GGUF file as a source of `model`'s parameters, under the model's own names."""

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        """Raises `CheckpointError`; `UnsupportedModelError` for tensors that have no place."""
        self._file = file
        self._config = model.config
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        try:
            transforms = _transforms(file, model)
        except Exception as error:  # whatever the rules raise on odd sizes
            raise self._mismatch(f"there are no rules for the model ({reason(error)})") from None
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        self._converters: dict[str, WeightConverter | None] = {}
        self._tensors: dict[str, dict[str, _Stored]] = defaultdict(dict)  # by pattern
        layers = model.config.get_text_config().num_hidden_layers
        for name, stored in _stored(file).items():
            block = _BLOCK.match(name)
            if block is not None and int(block[1]) >= layers:
                continue  # of the layers that predict further tokens, which the model leaves out
            target, pattern = rename_source_key(name, renamings, converters)
            if target not in self._shapes:
                raise UnsupportedModelError(
                    f"{file.path} has a tensor {name} that {model.config.model_type!r} in "
                    "transformers has no place for: use its safetensors checkpoint"
                )
            self._converters[target] = of_pattern.get(pattern)
            self._tensors[target][pattern or name] = stored
        for name in self._converters:
            self._check_shape(name)

    def names(self) -> list[str]:
        return list(self._converters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        stored = [tensor for part in self._tensors[name].values() for tensor in part.names]
        return functools.reduce(torch.promote_types, map(self._file.dtype, stored))

    def read(self, name: str) -> Tensor:
        made = self._convert(name, lambda part: part.read(self._file))
        return made.reshape(self._shapes[name])

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index : index + 1]`; no rule joins tensors along the experts' dimension."""
        if len(self._shapes[name]) < 2 or ".experts." not in name:
            return self.read(name)[index : index + 1]
        made = self._convert(name, lambda part: part.read_slice(self._file, index))
        return made.reshape(1, *self._shapes[name][1:])

    def _check_shape(self, name: str) -> None:
        """Raise `CheckpointError` unless the stored tensors make one of the model's shape."""
        parts = [part.shape(self._file) for part in self._tensors[name].values()]
        wanted = self._shapes[name]
        empty = functools.partial(torch.empty, device="meta")
        made = self._convert(name, lambda part: empty(part.shape(self._file))).shape
        fits = (
            [n for n in made if n > 1] == [n for n in wanted if n > 1]
            and sum(map(math.prod, parts)) == math.prod(wanted)  # a rule drops no numbers
            and len(set(parts)) == 1  # gates are as large as ups
        )
        if not fits:
            tensors = " and ".join(part.names[0] for part in self._tensors[name].values())
            shapes = " and ".join(map(str, parts))
            raise self._mismatch(f"{tensors}: shape {shapes} where the model asks for {wanted}")

    def _convert(self, name: str, read: Callable[[_Stored], Tensor]) -> Tensor:
        """What the rule for the parameter `name` makes of its tensors, as `read` gives them."""
        tensors = {pattern: read(part) for pattern, part in self._tensors[name].items()}
        converter = self._converters[name]
        if converter is None:
            return next(iter(tensors.values()))
        converter = deepcopy(converter)
        for pattern, tensor in tensors.items():
            converter.collected_tensors[pattern] = [tensor]
        try:
            made: Any = converter.convert(name, model=None, config=self._config)[name]
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise self._mismatch(f"the rule for {name} failed ({reason(error)})") from None
        return made[0] if isinstance(made, list) else made  # type: ignore[no-any-return]

    def _mismatch(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: {what}: the file's metadata and weights do not match"
        )
