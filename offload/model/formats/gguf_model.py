"""A GGUF file's metadata as a transformers config.

Knows: llama.cpp's metadata keys. Does not know: tensors' values.
transformers' own reading of GGUF has no Mixtral and leaves experts' sizes at a class's defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from offload.errors import CheckpointError, UnsupportedModelError, reason
from offload.model.formats.gguf_architecture import Architecture, architecture_of
from offload.model.formats.gguf_mapped import has_rules, mapped_config
from offload.model.formats.gguf_part import GgufFile

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
