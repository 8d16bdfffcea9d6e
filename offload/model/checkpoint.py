"""Sorts a checkpoint's tensors into experts and the rest, by transformers' own conversion rules."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from offload.errors import CheckpointError, UnsupportedModelError
from offload.model.seam import LAYER, ExpertsModule


class TensorSource(Protocol):
    """Tensors by name; a tensor is read and dequantised only when it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `read` returns."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor that `read` returns.

        Raises `CheckpointError` for a stored dtype that is not read.
        """

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, index: int) -> Tensor:
        """`read(name)[index : index + 1]`; only that part is read and dequantised."""


class ExpectedSource:
    """A source of `model`'s parameters that knows names, shapes and dtypes, and reads nothing.

    `model` is on meta. It stands for a checkpoint of which only the config has been fetched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tied = model.all_tied_weights_keys
        state: dict[str, Tensor] = model.state_dict()
        self._state = {name: tensor for name, tensor in state.items() if name not in tied}

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> NoReturn:
        raise CheckpointError(f"{name} cannot be read: only the model's config is here")

    def read_slice(self, name: str, index: int) -> NoReturn:
        self.read(name)


@dataclass
class _Parameter:
    """One expert parameter of the model and the checkpoint tensors it is made from."""

    converter: WeightConverter | None
    # pattern of the rule -> names of its tensors, in the order in which transformers stacks them
    sources: dict[str, list[str]]


# Operations that treat each expert by itself, as long as they do not act on dimension 0.
_PER_EXPERT = (MergeModulelist, Concatenate, Chunk, Interleave, Transpose)


class Checkpoint:
    """A source's tensors in the form that `model` needs. A tensor is read when it is asked for."""

    def __init__(
        self, source: TensorSource, model: PreTrainedModel, experts: list[ExpertsModule]
    ) -> None:
        """Match every tensor of `source` with a parameter of `model`.

        `model` is on meta and has its experts. Raises `CheckpointError` when a parameter has no
        tensors or its tensors have another shape.
        """
        self._source = source
        self._model = model
        self._state = model.state_dict()
        self._parameters: dict[str, _Parameter] = {}
        self.dense_names: list[str] = []
        self.plain: dict[str, str] = {}  # parameter -> the one tensor that is its value unchanged
        self._found: set[str] = set()  # parameters that are not experts
        self._splits = False  # whether one tensor of the checkpoint makes several parameters
        # The last parameter that could only be made for all experts of a layer at once.
        self._whole: tuple[str, Tensor] | None = None
        wanted = {name for module in experts for name in module.parameters}
        self._match(wanted)
        self._check_complete(wanted)

    def _match(self, wanted: set[str]) -> None:
        """Find each tensor's parameter as `convert_and_load_state_dict_in_model` does."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self._model.base_model_prefix
        for name in sorted(self._source.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = rename_source_key(name, [], [], prefix, self._state)
            if target in wanted:
                converter = of_pattern[pattern] if pattern is not None else None
                parameter = self._parameters.setdefault(
                    target, _Parameter(converter, defaultdict(list))
                )
                parameter.sources[pattern or name].append(name)
            elif target in self._state:
                self.dense_names.append(name)
                if pattern is None:
                    _check_shape(name, self._source.shape(name), self._state[target].shape)
                    self.plain[target] = name
                elif len(of_pattern[pattern].target_patterns) > 1:
                    self._splits = True
                self._found.add(target)

    def _check_complete(self, wanted: set[str]) -> None:
        """Raise `CheckpointError` when tensors are missing, of the experts `wanted` or others."""
        missing = wanted - self._parameters.keys()
        if not self._splits:  # else a rule's further parameters are known when it has run
            optional = self._model._keys_to_ignore_on_load_missing or []
            tied = self._model.all_tied_weights_keys.keys()
            missing |= {
                name
                for name in self._state.keys() - wanted - self._found - tied
                if not any(re.search(pattern, name) for pattern in optional)
            }
        if missing:
            raise CheckpointError(
                f"the checkpoint has no tensor for {min(missing)}: {self._why(missing)}"
            )
        for name, parameter in self._parameters.items():
            experts = self._state[name].shape[0]
            for pattern, sources in parameter.sources.items():
                per_expert = len(sources) == experts
                fused = len(sources) == 1 and self._source.shape(sources[0])[:1] == (experts,)
                if not per_expert and not fused and _splits_by_expert(parameter.converter):
                    raise CheckpointError(
                        f"the checkpoint has {len(sources)} tensors {pattern!r} for the {experts} "
                        f"experts of {name}: it is incomplete, fetch it again"
                    )

    def _why(self, missing: Set[str]) -> str:
        """What to do about a checkpoint that lacks tensors, by the names that it has instead."""
        names = self._source.names()
        if any(".lora_A." in name for name in names):
            return "it is a LoRA adapter, merge it into its base model and save that"
        if any(".switch_mlp." in name for name in names):
            return "its names are those of MLX, use the checkpoint that it was made from"
        for parameter in sorted(name for name in missing if not LAYER.match(name)):
            for name in names:
                if name.endswith(f".{parameter}") or name.endswith(f"_{parameter}"):
                    prefix = name.removesuffix(parameter)
                    return (
                        f"its names begin with {prefix!r}, as a training wrapper makes them; save "
                        "the inner model with save_pretrained, or rename its tensors"
                    )
        return "it is incomplete, fetch it again"

    def dense(self, leave_out: Set[str] = frozenset()) -> list[tuple[str, int]]:
        """The name and the bytes of each tensor in the checkpoint that is not an expert's.

        The tensors of the parameters `leave_out` are not among them.
        """
        left_out = {self.plain[parameter] for parameter in leave_out & self.plain.keys()}
        return [
            (name, math.prod(self._source.shape(name)) * self._source.dtype(name).itemsize)
            for name in self.dense_names
            if name not in left_out
        ]

    def read(self, name: str) -> Tensor:
        """The tensor `name`, one of those that `dense` lists."""
        return _finite(self._source.read(name), name)

    def plain_dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which the checkpoint stores a parameter of `plain`."""
        return self._source.dtype(self.plain[parameter])

    def dense_parameters(self) -> int:
        """Number of weights in all tensors that `dense` lists."""
        return sum(math.prod(self._source.shape(name)) for name in self.dense_names)

    def expert(self, module: ExpertsModule, expert: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """One expert's matrices by name: `(weight [out, in], bias [out] or None)`."""
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for name, (matrix, is_bias) in module.parameters.items():
            value = self._expert_parameter(name, expert)
            _check_shape(f"{name} of expert {expert}", value.shape, self._state[name].shape[1:])
            (biases if is_bias else weights)[matrix] = _finite(value, f"{name}, expert {expert}")
        return {
            matrix: (weight.t() if module.transposed else weight, biases.get(matrix))
            for matrix, weight in weights.items()
        }

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that holds every stored tensor of the expert parameter `name` exactly."""
        dtypes = {
            self._source.dtype(source)
            for sources in self._parameters[name].sources.values()
            for source in sources
        }
        return functools.reduce(torch.promote_types, dtypes)

    def _expert_parameter(self, name: str, expert: int) -> Tensor:
        parameter = self._parameters[name]
        if not _splits_by_expert(parameter.converter):
            return self._whole_parameter(name)[expert]
        tensors: dict[str, list[Tensor]] = {}
        for pattern, sources in parameter.sources.items():
            # The one source of a one-expert module may lack the experts' dimension.
            if len(sources) > 1 or len(self._source.shape(sources[0])) < self._state[name].dim():
                tensors[pattern] = [self._source.read(sources[expert])]
            else:
                tensors[pattern] = [self._source.read_slice(sources[0], expert)]
        return self._convert(name, tensors, one_expert=True)[0]

    def _whole_parameter(self, name: str) -> Tensor:
        if self._whole is None or self._whole[0] != name:
            self._whole = None  # free this layer before the next is made: at most one is held
            sources = self._parameters[name].sources
            tensors = {p: [self._source.read(s) for s in names] for p, names in sources.items()}
            self._whole = (name, self._convert(name, tensors, one_expert=False))
        return self._whole[1]

    def _convert(self, name: str, tensors: dict[str, list[Tensor]], *, one_expert: bool) -> Tensor:
        converter = self._parameters[name].converter
        if converter is None:
            return next(iter(tensors.values()))[0]
        converter = deepcopy(converter)
        for pattern, values in tensors.items():
            converter.collected_tensors[pattern] = values
        # A rule may ask the model for the parameter's shape.
        shapes = SimpleNamespace(get_parameter=lambda name: self._state[name][:1])
        model = shapes if one_expert else self._model
        try:
            return converter.convert(name, model=model, config=self._model.config)[name]  # type: ignore[no-any-return]
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            kind = self._model.config.model_type
            raise UnsupportedModelError(
                f"{kind!r} is not supported: transformers' rule for {name} failed here "
                f"({error!r}); run it with transformers itself"
            ) from None


def _check_shape(what: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise CheckpointError(
            f"{what} has shape {tuple(found)} where the model's config asks for {tuple(wanted)}: "
            "config.json and weights do not match"
        )


def _finite(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor`. Raises `CheckpointError` when one of its values is NaN or infinite."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()  # both are NaN when any value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{name} has values that are not numbers or infinite: the checkpoint is damaged, "
                "fetch it again"
            )
    return tensor


def _splits_by_expert(converter: WeightConverter | None) -> bool:
    """Whether a rule can be run for one expert at a time."""
    if converter is None:
        return True
    for operation in converter.operations:
        if not isinstance(operation, _PER_EXPERT):
            return False
        dims = [d for name, d in vars(operation).items() if name in ("dim", "dim0", "dim1")]
        stacks_experts = isinstance(operation, MergeModulelist) and dims == [0]
        if not stacks_experts and min(dims) < 1:
            return False
    return True
