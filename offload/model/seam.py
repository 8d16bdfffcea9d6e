"""Builds transformers models without the weights that a pack's records hold.

Experts are replaced at transformers' experts seam, which is `use_experts_implementation` with
`ExpertsInterface`: a registered function answers in the place of an experts module.
"""

import inspect
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.moe import ExpertsInterface

from offload.errors import CheckpointError, UnsupportedModelError
from offload.lines import reason
from offload.model.layout import CHOSEN
from offload.quant.errors import PackError
from offload.quant.manifest import REMAKE
from offload.quant.matmul import dequantize, matmul, take_rows
from offload.quant.record import MatrixSpec, MatrixView

IMPLEMENTATION = "offload"  # our name in transformers' registry of experts functions
DESCRIBED = "_offload_experts"  # attribute of a model: what its experts were before stripping
BUILDING = threading.Lock()  # transformers changes torch's default dtype while it builds a model
BLOCK = "_offload_block"  # attribute of an experts module: what computes its experts
MATRICES = ("gate_up_proj", "up_proj", "down_proj")
MOST_LAYERS = 4096  # a config that asks for more is damaged, and building would take very long
LAYER = re.compile(r"(.*?)\.(\d+)\.")  # of a module's path: "model.layers" and the index


# Computes one MoE layer's experts: hidden [T, H], top-k index [T, k], weights [T, k] -> [T, H].
ExpertBlock = Callable[[Tensor, Tensor, Tensor], Tensor]
ExpertsInterface.register(IMPLEMENTATION, lambda module, *call: getattr(module, BLOCK)(*call))


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module: its path in the model and the matrices of each of its experts."""

    path: str
    num_experts: int
    transposed: bool  # the checkpoint's matrices are [in, out]
    matrices: tuple[MatrixSpec, ...]  # always as [out, in]

    @property
    def parameters(self) -> dict[str, tuple[str, bool]]:
        """Full parameter name -> (matrix it belongs to, whether it is the bias)."""
        names = {}
        for matrix in self.matrices:
            names[f"{self.path}.{matrix.name}"] = (matrix.name, False)
            if matrix.has_bias:
                names[f"{self.path}.{matrix.name}_bias"] = (matrix.name, True)
        return names


def model_class(
    config: PreTrainedConfig, source: str, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The class that generates text from a checkpoint with this config.

    Raises `UnsupportedModelError` when transformers has none, or when the checkpoint's own code
    cannot be given a KV cache.
    """
    given = getattr(config, "auto_map", None)
    reference = given.get("AutoModelForCausalLM") if isinstance(given, dict) else None
    if reference and trust_remote_code:
        remote: type[PreTrainedModel] = get_class_from_dynamic_module(reference, source)
        if "cache" not in inspect.signature(remote.forward).parameters:
            raise UnsupportedModelError(
                f"{source}: the model's own code was written for an older transformers (forward "
                "takes no `cache`), and would forget the prompt: leave out --trust-remote-code if "
                "transformers knows the model, or ask its authors for newer code"
            )
        return remote
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"{source}: transformers has no text-generating model for {config.model_type!r}: "
        "use a checkpoint of a causal language model"
    )


def own_config(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The part of `config` that `cls` is built from: a composite's text part for its text model."""
    if cls.config_class is config.sub_configs.get("text_config"):
        return config.get_text_config()
    return config


def build_on_meta(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """The whole model that a config describes, experts included, without memory for any weight.

    Raises `CheckpointError` for a config that no model can be built from.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise CheckpointError(
            f"the model's config has num_hidden_layers {layers}, more than any model: fetch it "
            "again"
        )
    try:
        with BUILDING, torch.device("meta"):
            return cls._from_config(own_config(config, cls))
    except Exception as error:  # whatever a model class raises on odd values
        raise CheckpointError(
            f"the model's config has values that no {cls.__name__} can be built from "
            f"({reason(error)}): fetch it again"
        ) from None


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers' experts seam is in front of `module`."""
    return all(
        hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_gate", "has_bias")
    )


def find_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """Every experts module of `model` in the order of its layers.

    Raises `UnsupportedModelError` when there is none, or when one has parameters other than those
    of `MATRICES` and their biases; `CheckpointError` when the config's numbers are impossible.
    """
    found = [
        _describe(path, module)
        for path, module in model.named_modules()
        if is_experts_module(module)
    ]
    if found:
        _check_sizes(model.config.get_text_config(), found)
        return found
    kind = model.config.model_type
    if any("expert" in name for name, _ in model.named_parameters()):
        raise UnsupportedModelError(
            f"{kind!r} is not supported: transformers has its experts outside the experts seam "
            "(use_experts_implementation); run it with transformers itself"
        )
    raise UnsupportedModelError(
        f"{kind!r} is not a Mixture-of-Experts model: it has no experts to offload; run it with "
        "transformers itself"
    )


def chosen_experts(config: PreTrainedConfig) -> int:
    """The number of experts that a token is sent to; 0 when the config does not say it."""
    text = config.get_text_config()
    return next((k for name in CHOSEN if isinstance(k := getattr(text, name, None), int)), 0)


def _check_sizes(config: PreTrainedConfig, experts: list[ExpertsModule]) -> None:
    for module in experts:
        sizes = {module.num_experts, *(n for m in module.matrices for n in (m.rows, m.columns))}
        if min(sizes) < 1:
            raise CheckpointError(
                f"the model's config makes {module.path} of {module.num_experts} experts with "
                f"sizes {sorted(sizes)}: fetch it again"
            )
    most = max(module.num_experts for module in experts)
    for name in CHOSEN:
        given = getattr(config, name, None)
        for chosen in given if isinstance(given, list) else [given]:
            if chosen is not None and (type(chosen) is not int or not 1 <= chosen <= most):
                raise CheckpointError(
                    f"the model's config has {name} {chosen!r} where a layer has {most} experts: "
                    "fetch it again"
                )


def _describe(path: str, module: nn.Module) -> ExpertsModule:
    transposed = bool(module.is_transposed)
    parameters = dict(module.named_parameters(recurse=False))
    matrices = []
    for name in MATRICES:
        weight = parameters.pop(name, None)
        if weight is None:
            continue
        bias = parameters.pop(f"{name}_bias", None)
        rows, columns = weight.shape[-2:] if not transposed else weight.shape[:-3:-1]
        matrices.append(
            MatrixSpec(name, rows, columns, bias is not None, weight.dtype, weight.dtype)
        )
        experts = weight.shape[0]
    expected = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if parameters or tuple(m.name for m in matrices) != expected:
        names = ", ".join([*parameters, *(m.name for m in matrices)])
        raise UnsupportedModelError(
            f"{type(module).__name__} is not supported: its parameters ({names}) are not those of "
            "an experts block this program knows; run it with transformers itself"
        )
    return ExpertsModule(path, experts, transposed, tuple(matrices))


class _FromRecord(nn.Module):
    """A module whose weight [rows, columns] lies in the record given to `bind`."""

    def bind(self, view: MatrixView, dtype: torch.dtype) -> None:
        """Compute from `view` from now on, with results in `dtype`."""
        self.view, self._dtype = view, dtype

    @property
    def weight(self) -> Tensor:
        """The whole matrix [rows, columns], unpacked at each use, for code that reads `weight`."""
        return dequantize(self.view, self._dtype)


class QuantizedLinear(_FromRecord):
    """Takes the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shape = (linear.out_features, linear.in_features)
        self.bias = linear.bias  # not in the record: it stays a parameter of the model

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out = matmul(x.reshape(-1, self.in_features), self.view)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


class QuantizedEmbedding(_FromRecord):
    """Takes the place of an `nn.Embedding`."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.shape = (table.num_embeddings, table.embedding_dim)
        self.padding_idx = table.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim].

        On the CPU, raises `IndexError` for an id that is not in the table.
        """
        if ids.device.type == "cpu" and ids.numel():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"there is no row {int(high if low >= 0 else low)} in the table")
        return take_rows(self.view, ids.flatten(), self._dtype).view(*ids.shape, -1)


def without_packed_weights(
    cls: type[PreTrainedModel], quantised: Sequence[str]
) -> type[PreTrainedModel]:
    """A class like `cls` whose instances lack the weights that records hold: those of experts, and
    those of the modules with the paths `quantised`."""

    def __init__(
        self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        cls.__init__(self, config, *args, **kwargs)
        setattr(self, DESCRIBED, find_experts(self))
        for module in experts_modules(self):
            for name, _ in list(module.named_parameters(recurse=False)):
                delattr(module, name)
            module._is_hf_initialized = True  # type: ignore[assignment]  # its class would init
        modules = dict(self.named_modules())
        for path in quantised:
            self.set_submodule(path, _from_record(path, modules.get(path)))

    kept = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {"__init__": __init__, **kept})


def _from_record(path: str, module: nn.Module | None) -> QuantizedLinear | QuantizedEmbedding:
    if type(module) is nn.Embedding:
        return QuantizedEmbedding(module)
    if type(module) is nn.Linear:
        return QuantizedLinear(module)
    raise PackError(f"the pack has a matrix for {path!r}, where the model has none: {REMAKE}")


def described_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """What `find_experts` returned for the model before `without_packed_weights` stripped it."""
    return getattr(model, DESCRIBED)  # type: ignore[no-any-return]


def experts_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that `find_experts` describes, in the same order."""
    return [module for module in model.modules() if is_experts_module(module)]


def install(module: nn.Module, block: ExpertBlock) -> None:
    """Let `block` compute the experts of `module`."""
    object.__setattr__(module, BLOCK, block)


def find_router(model: nn.Module, experts_path: str, num_experts: int) -> nn.Module | None:
    """The module beside the experts that chooses among them; None when none can be recognised.

    A router of transformers has a weight [num_experts, H] and returns `(logits, weights, index,
    ...)`.
    """
    parent = model.get_submodule(experts_path.rpartition(".")[0])
    for child in parent.children():
        weights = [p for p in child.parameters() if p.dim() == 2 and p.shape[0] == num_experts]
        if weights and not is_experts_module(child):
            return child
    return None


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether the head has the weights of the token table."""
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    return f"{path}.weight" in model.all_tied_weights_keys


def layer_of(path: str) -> int | None:
    """The decoder layer of the module at `path`; None for a module outside of all layers."""
    match = LAYER.match(path)
    return int(match[2]) if match else None
