"""Reads a GGUF file's metadata as a transformers config and generation config.

transformers' own `get_gguf_config` does it for the architectures it has. For `ARCHITECTURES`, its
older loader would read the whole file, knows no Mixtral and leaves experts' sizes at defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.integrations.gguf import GGUF_ARCHS, GGUF_CONFIG_ARCHS, get_gguf_config

from offload.errors import CheckpointError, UnsupportedModelError
from offload.lines import reason
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_tokenizer import end_tokens, gguf_tokenizer, token_ids
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


def _architecture(file: GgufFile) -> Architecture:
    """The architecture of a file. Raises `UnsupportedModelError` for one that is not read."""
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


def has_rules(file: GgufFile) -> bool:
    """Whether transformers has rules for this file's architecture."""
    name = file.fields.get("general.architecture")
    return isinstance(name, str) and name in GGUF_CONFIG_ARCHS and name in GGUF_ARCHS


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
        if has_rules(file):
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
    predicting = values.get("nextn_predict_layers")  # layers after the model's own
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
    ids = token_ids(file)
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    config |= {f"{name}_token_id": ids.get(key) for name, key in names.items()}
    config = {name: value for name, value in config.items() if value is not None}
    return {"model_type": known.model_type, **config, **known.fixed}


def save_config_files(path: Path, folder: Path) -> None:
    """Write into `folder` what a checkpoint folder has beside its weights, as the metadata of the
    GGUF model `path` says: config, generation config, and the tokenizer if there is one.

    Raises `OffloadError`.
    """
    gguf_config(path).save_pretrained(folder)
    file = GgufFile(path)
    ids = token_ids(file)
    ends = [ids[name] for name in ("eos", "eot") if name in ids]
    if "tokenizer.ggml.tokens" in file.fields:
        gguf_tokenizer(path).save_pretrained(folder)
        ends = end_tokens(file)
    GenerationConfig(
        bos_token_id=ids.get("bos"), eos_token_id=ends or None, pad_token_id=ids.get("padding")
    ).save_pretrained(folder)


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


class _Metadata(dict[str, Any]):
    """The metadata under an architecture's name."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._prefix = file.fields["general.architecture"]
        parts = ((*key.partition("."), value) for key, value in file.fields.items())
        super().__init__((key, value) for name, _, key, value in parts if name == self._prefix)

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
