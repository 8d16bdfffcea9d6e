"""A GGUF file's metadata as a transformers config.

Knows: llama.cpp's metadata keys. Does not know: tensors' values.
transformers' own reading of GGUF has no Mixtral and leaves experts' sizes at a class's defaults.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from offload.errors import CheckpointError, UnsupportedModelError
from offload.lines import reason
from offload.model.formats.gguf import GgufFile, library
from offload.model.seam import is_experts_module


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures and what transformers calls it and its parts."""

    name: str
    model_type: str
    experts: str  # the config's name for how many experts a layer has
    inner: str  # and for their inner size
    permuted: bool = False  # llama.cpp's converter reorders the rows of queries and keys
    partial: bool = False  # only the first part of a head rotates
    also: dict[str, str] = field(default_factory=dict)  # more metadata keys
    reals: dict[str, str] = field(default_factory=dict)  # and of real numbers
    present: dict[str, str] = field(default_factory=dict)  # true when there is such a tensor
    fixed: dict[str, Any] = field(default_factory=dict)  # what llama.cpp takes for granted


ARCHITECTURES = {
    known.name: known
    for known in (
        Architecture("llama", "mixtral", "num_local_experts", "intermediate_size", permuted=True),
        Architecture("qwen2moe", "qwen2_moe", "num_experts", "moe_intermediate_size"),
        Architecture(
            "qwen3moe",
            "qwen3_moe",
            "num_experts",
            "moe_intermediate_size",
            fixed={"norm_topk_prob": True},
        ),
        Architecture("olmoe", "olmoe", "num_experts", "intermediate_size"),
        Architecture(
            "granitemoe",
            "granitemoe",
            "num_local_experts",
            "intermediate_size",
            permuted=True,
            reals={
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
        ),
        Architecture(
            "gpt-oss",
            "gpt_oss",
            "num_local_experts",
            "intermediate_size",
            also={"attention.sliding_window": "sliding_window"},
        ),
        Architecture(
            "glm4moe",
            "glm4_moe",
            "n_routed_experts",
            "moe_intermediate_size",
            partial=True,
            also={
                "leading_dense_block_count": "first_k_dense_replace",
                "expert_shared_count": "n_shared_experts",
            },
            reals={"expert_weights_scale": "routed_scaling_factor"},
            present={"attn_q.bias": "attention_bias", "attn_q_norm.weight": "use_qk_norm"},
            fixed={"norm_topk_prob": True, "num_mtp_layers": 0},
        ),
        Architecture(
            "minimax-m2", "minimax_m2", "num_local_experts", "intermediate_size", partial=True
        ),
    )
}


def architecture_of(file: GgufFile) -> Architecture:
    """Raises `UnsupportedModelError` for one that is not read."""
    name = file.fields.get("general.architecture")
    if name == "llama" and not file.fields.get("llama.expert_count"):
        raise UnsupportedModelError(
            f"{file.path} is not a Mixture-of-Experts model: it has no experts to offload; run it "
            "with llama.cpp"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} is of llama.cpp's architecture {name!r}; {', '.join(ARCHITECTURES)} are "
            "read: use the model's safetensors checkpoint"
        )
    return ARCHITECTURES[name]


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


_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "expert_used_count": "num_experts_per_tok",
}
_NEEDED = ("block_count", "embedding_length", "attention.head_count", "expert_used_count")


def read_config(path: Path) -> PreTrainedConfig:
    """The config of the GGUF model `path`. Raises `OffloadError`."""
    file = GgufFile(path)
    config = mapped_config(file) if has_rules(file) else _own_config(file)
    plain = all(file.dtype(n) == torch.float32 for n, t in file.tensors.items() if len(t.shape) > 1)
    config.dtype = torch.float32 if plain else torch.bfloat16
    return config


def _own_config(file: GgufFile) -> PreTrainedConfig:
    known = architecture_of(file)
    values = _Metadata(file, known.name)
    config: dict[str, Any] = {
        name: values.number(key) for key, name in {**_KEYS, **known.also}.items() if key in values
    }
    for key in _NEEDED:
        if key not in values:
            raise values.error(key, "is missing")
    config[known.experts] = values.number("expert_count")
    reals = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", **known.reals}
    config |= {name: values.real(key) for key, name in reals.items() if key in values}
    for ending, name in known.present.items():
        config[name] = any(tensor.endswith(f".{ending}") for tensor in file.tensors)
    config["num_hidden_layers"] = layers_of(file)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    widths = [k for k in ("attention.key_length", "rope.dimension_count") if k in values]
    config["head_dim"] = values.number(widths[0]) if widths else hidden // heads
    config[known.inner] = _columns(file, "ffn_down_exps", "ffn_down.0")
    if known.name == "qwen2moe" and (shared := _columns(file, "ffn_down_shexp")):
        config["shared_expert_intermediate_size"] = shared
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.shape("token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["rope_parameters"] = _rope(values, known)
    if known.partial and "rope.dimension_count" in values:
        part = values.number("rope.dimension_count") / config["head_dim"]
        config["rope_parameters"]["partial_rotary_factor"] = part
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{name}_token_id"] = token if type(token) is int else None
    try:
        made: PreTrainedConfig = CONFIG_MAPPING[known.model_type](
            **{name: value for name, value in config.items() if value is not None}, **known.fixed
        )
    except Exception as error:  # whatever a config class raises on odd values
        raise CheckpointError(
            f"{file.path} has unusable metadata ({reason(error)}): fetch it again"
        ) from None
    return made


def layers_of(file: GgufFile) -> int:
    """Decoder layers, without those llama.cpp has behind them to predict several tokens."""
    values = _Metadata(file, architecture_of(file).name)
    more = values.get("nextn_predict_layers")
    return values.number("block_count") - (more if type(more) is int and more > 0 else 0)


def generation_config(path: Path) -> GenerationConfig:
    """When a model ends its answer: at the end of a text or of a turn."""
    fields = GgufFile(path).fields
    ids = {
        name: fields.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "eot", "padding")
    }
    ids = {name: token if type(token) is int else None for name, token in ids.items()}
    ends = list(dict.fromkeys(n for n in (ids["eos"], ids["eot"]) if n is not None))
    return GenerationConfig(
        bos_token_id=ids["bos"], eos_token_id=ends or None, pad_token_id=ids["padding"]
    )


def _columns(file: GgufFile, *stems: str) -> int | None:
    """The inner size of the first layer that has one of these projections."""
    for name, tensor in file.tensors.items():
        if any(name.endswith(f".{stem}.weight") for stem in stems):
            return tensor.shape[-1]
    return None


def _rope(values: _Metadata, known: Architecture) -> dict[str, Any]:
    """Rotary embedding parameters. Raises `UnsupportedModelError` for a scaling not read."""
    rope = dict(CONFIG_MAPPING[known.model_type]().rope_parameters)
    if "rope.freq_base" in values:
        rope["rope_theta"] = values.real("rope.freq_base")
    kind = values.get("rope.scaling.type")
    if kind in (None, "none"):
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{values.path} scales its rotary embedding by {kind!r}, which is not read: use the "
            "model's safetensors checkpoint"
        )
    rope |= {"rope_type": kind, "factor": values.real("rope.scaling.factor")}
    if "rope.scaling.original_context_length" in values:
        length = values.number("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = length
    return rope


class _Metadata:
    """The metadata under an architecture's name."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.path = file.path
        self._fields = file.fields
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return f"{self._prefix}.{key}" in self._fields

    def get(self, key: str) -> Any:
        return self._fields.get(f"{self._prefix}.{key}")

    def number(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise self.error(key, f"is {value!r}")
        return value

    def real(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.error(key, f"is {value!r}")
        return float(f"{value:.7g}")  # stored in single precision: 1e-5 and not 9.99999974e-06

    def error(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._prefix}.{key} in the metadata of {self.path} {what}: fetch it again"
        )


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
