"""A GGUF file as a transformers model: its config, and its tensors under the model's own names.

The rules of `transformers.integrations.gguf` are used for the architectures it has. Those of
`ARCHITECTURES` are described here in the same terms, because transformers reads them by an older
loader, which holds the whole model, knows no Mixtral and leaves experts' sizes at their defaults.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)
from transformers.core_model_loading import (
    ConversionOps,
    Interleave,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.integrations.gguf import (
    GGUF_ARCHS,
    GGUF_CONFIG_ARCHS,
    get_gguf_config,
    get_gguf_conversion_mapping,
)
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    ConcatenateRows,
    PermuteRows,
)

from offload.errors import CheckpointError, UnsupportedModelError
from offload.lines import reason
from offload.model.formats.gguf import GgufFile, gguf_files
from offload.model.seam import is_experts_module
from offload.quant.errors import OffloadError


@dataclass(frozen=True)
class Architecture:
    """What transformers calls one of llama.cpp's architectures, and where the two differ."""

    model_type: str
    experts: str  # the config's name for the number of experts in a layer
    inner: str  # the config's name for their inner size
    permuted: bool = False  # llama.cpp's converter reorders the rows of queries and keys
    partial: bool = False  # rotary embedding turns only the first part of a head
    also: dict[str, str] = field(default_factory=dict)  # more metadata keys of whole numbers
    reals: dict[str, str] = field(default_factory=dict)  # and of real numbers
    present: dict[str, str] = field(default_factory=dict)  # true when there is such a tensor
    fixed: dict[str, Any] = field(default_factory=dict)  # what llama.cpp takes for granted
    names: dict[str, str] = field(default_factory=dict)  # tensors whose name is not in `_NAMES`


ARCHITECTURES = {
    "llama": Architecture("mixtral", "num_local_experts", "intermediate_size", permuted=True),
    "qwen2moe": Architecture("qwen2_moe", "num_experts", "moe_intermediate_size"),
    "qwen3moe": Architecture(
        "qwen3_moe", "num_experts", "moe_intermediate_size", fixed={"norm_topk_prob": True}
    ),
    "olmoe": Architecture("olmoe", "num_experts", "intermediate_size"),
    "granitemoe": Architecture(
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
        names={"ffn_gate_inp.": "block_sparse_moe.router."},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "num_local_experts",
        "intermediate_size",
        also={"attention.sliding_window": "sliding_window"},
        names={"ffn_gate_inp.": "mlp.router."},
    ),
    "glm4moe": Architecture(
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
        names={
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
            "ffn_gate_shexp.": "mlp.shared_experts.gate_proj.",
            "ffn_up_shexp.": "mlp.shared_experts.up_proj.",
            "ffn_down_shexp.": "mlp.shared_experts.down_proj.",
        },
    ),
    "minimax-m2": Architecture(
        "minimax_m2", "num_local_experts", "intermediate_size", partial=True
    ),
}
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


def _architecture(file: GgufFile) -> Architecture:
    """Raises `UnsupportedModelError` for an architecture that is not read."""
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


def _has_rules(file: GgufFile) -> bool:
    """Whether transformers has rules for this file's architecture."""
    name = file.fields.get("general.architecture")
    return isinstance(name, str) and name in GGUF_CONFIG_ARCHS and name in GGUF_ARCHS


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
    if _has_rules(file):
        theirs: list[WeightTransform] = get_gguf_conversion_mapping(architecture, model.config)
        return theirs
    known = ARCHITECTURES[architecture]
    experts = next((m for m in model.modules() if is_experts_module(m)), None)
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
    for end in ("", "_bias"):
        turned = []
        if experts is not None and experts.is_transposed and not end:
            turned = [TransposedView()]
            transforms.append(
                WeightConverter(r"\.experts.down_proj", ".experts.down_proj", [*turned])
            )
        if not getattr(experts, "is_concatenated", True):  # gate and up alternate
            turned.insert(0, Interleave(1, inverse=True))
        for sources in (["gate", "up"], ["gate_up"]):
            transforms.append(
                WeightConverter(
                    [rf"\.experts.{projection}_proj{end}" for projection in sources],
                    f".experts.gate_up_proj{end}",
                    [ConcatenateRows(dim=1), *turned],
                )
            )
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
        parts = {pattern: part.read(self._file) for pattern, part in self._tensors[name].items()}
        return self._convert(name, parts).reshape(self._shapes[name])

    def read_slice(self, name: str, index: int) -> Tensor:
        """The rules join the parts of experts along other dimensions than the experts'."""
        if len(self._shapes[name]) < 2 or ".experts." not in name:
            return self.read(name)[index : index + 1]
        parts = {
            pattern: part.read_slice(self._file, index)
            for pattern, part in self._tensors[name].items()
        }
        return self._convert(name, parts).reshape(1, *self._shapes[name][1:])

    def _check_shape(self, name: str) -> None:
        """Raise `CheckpointError` unless the stored tensors make one of the model's shape."""
        parts = {pattern: part.shape(self._file) for pattern, part in self._tensors[name].items()}
        wanted = self._shapes[name]
        empty = {pattern: torch.empty(shape, device="meta") for pattern, shape in parts.items()}
        made = self._convert(name, empty).shape
        fits = (
            [n for n in made if n > 1] == [n for n in wanted if n > 1]
            and sum(map(math.prod, parts.values())) == math.prod(wanted)  # a rule drops no numbers
            and len(set(parts.values())) == 1  # gates are as large as ups
        )
        if not fits:
            tensors = " and ".join(part.names[0] for part in self._tensors[name].values())
            shapes = " and ".join(map(str, parts.values()))
            raise self._mismatch(f"{tensors}: shape {shapes} where the model asks for {wanted}")

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
            raise self._mismatch(f"the rule for {name} failed ({reason(error)})") from None
        return made[0] if isinstance(made, list) else made  # type: ignore[no-any-return]

    def _mismatch(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: {what}: the file's metadata and weights do not match"
        )


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


def gguf_config(path: Path) -> PreTrainedConfig:
    """The config of the GGUF model `path`. Raises `OffloadError`."""
    file = GgufFile(path)
    try:
        if _has_rules(file):
            values = get_gguf_config(file.fields, tuple(file.tensors))
        else:
            values = _own_config(file)
        config: PreTrainedConfig = CONFIG_MAPPING[values.pop("model_type")](**values)
    except OffloadError:
        raise
    except Exception as error:  # whatever the rules and a config class raise on odd metadata
        raise CheckpointError(
            f"{path} has unusable metadata ({reason(error)}): fetch it again"
        ) from None
    plain = all(file.dtype(n) == torch.float32 for n, t in file.tensors.items() if len(t.shape) > 1)
    config.dtype = torch.float32 if plain else torch.bfloat16
    return config


def _own_config(file: GgufFile) -> dict[str, Any]:
    """What the class of one of `ARCHITECTURES` is made from. Raises `OffloadError`."""
    known = _architecture(file)
    values = _Metadata(file)
    for key in _NEEDED:
        if key not in values:
            raise values.error(key, "is missing")
    config: dict[str, Any] = {
        name: values.number(key) for key, name in {**_KEYS, **known.also}.items() if key in values
    }
    config[known.experts] = values.number("expert_count")
    reals = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", **known.reals}
    config |= {name: values.real(key) for key, name in reals.items() if key in values}
    for ending, name in known.present.items():
        config[name] = any(tensor.endswith(f".{ending}") for tensor in file.tensors)
    predicting = values.get("nextn_predict_layers")  # layers behind the model's own
    if type(predicting) is int and predicting > 0:
        config["num_hidden_layers"] -= predicting
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    widths = [k for k in ("attention.key_length", "rope.dimension_count") if k in values]
    config["head_dim"] = values.number(widths[0]) if widths else hidden // heads
    config[known.inner] = _columns(file, "ffn_down_exps", "ffn_down.0")
    if known.model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = _columns(file, "ffn_down_shexp")
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.shape("token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["rope_parameters"] = _rope(values, known)
    if known.partial and "rope.dimension_count" in values:
        part = values.number("rope.dimension_count") / config["head_dim"]
        config["rope_parameters"]["partial_rotary_factor"] = part
    tokens = _token_ids(file)
    config |= {f"{name}_token_id": tokens[name] for name in ("bos", "eos", "pad")}
    config = {name: value for name, value in config.items() if value is not None}
    return {"model_type": known.model_type, **config, **known.fixed}


def _token_ids(file: GgufFile) -> dict[str, int | None]:
    """The ids of special tokens: of the end of a text (eos), the end of a turn (eot) and others."""
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding"}
    found = {name: file.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: token if type(token) is int else None for name, token in found.items()}


def save_config_files(path: Path, folder: Path) -> None:
    """Write into `folder` what a checkpoint folder has beside its weights, as the metadata of the
    GGUF model `path` says: config, generation config, and the tokenizer if there is one.

    Raises `OffloadError`.
    """
    file, config = GgufFile(path), gguf_config(path)
    config.save_pretrained(folder)
    tokens = _token_ids(file)
    ends = list(dict.fromkeys(tokens[name] for name in ("eos", "eot") if tokens[name] is not None))
    GenerationConfig(
        bos_token_id=tokens["bos"], eos_token_id=ends or None, pad_token_id=tokens["pad"]
    ).save_pretrained(folder)
    if "tokenizer.ggml.tokens" in file.fields:
        # llama.cpp gives Mixtral the tokenizer of Llama
        of_llama = file.fields["general.architecture"] == "llama"
        gguf_tokenizer(path, LlamaConfig if of_llama else type(config)).save_pretrained(folder)


def gguf_tokenizer(path: Path, config: type[PreTrainedConfig]) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, as transformers makes it for models with such a `config`.

    `AutoTokenizer` would read the config once more, and with it the whole file, to find the class.
    Raises `CheckpointError`.
    """
    file = gguf_files(path)[0]
    cls = TOKENIZER_MAPPING.get(config, TokenizersBackend)
    try:
        tokenizer: PreTrainedTokenizerBase = cls.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except Exception as error:  # whatever transformers raises on what is in the metadata
        raise CheckpointError(
            f"transformers cannot make the tokenizer in {file} ({reason(error)}): use the "
            "model's safetensors checkpoint"
        ) from None
    return tokenizer


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

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._fields = file.fields
        self._prefix = file.fields["general.architecture"]

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
