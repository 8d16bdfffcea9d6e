"""Makes tiny random checkpoints of real architectures.

A config class's defaults are replaced by the small values of `SHRUNK`, whose names architectures
share, and by those of `DIFFERENT` for single architectures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

LAYERS = 3
EXPERTS = 8
K = 2

SHRUNK: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": K,
    "top_k_experts": K,
    "moe_topk": K,
    "moe_k": K,
    "moe_num_experts": EXPERTS,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "max_position_embeddings": 512,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_nextn_predict_layers": 0,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
}

# Values that an architecture needs besides those of `SHRUNK`.
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DIFFERENT: dict[str, dict[str, Any]] = {
    "qwen3_next": MIXED,
    "qwen3_5_moe_text": MIXED,
    "bailing_hybrid": MIXED,
    "granitemoehybrid": MIXED,
    "kimi_linear": MIXED,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"]
    },
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    # Its layers with full attention have a head size of their own, which is no attribute.
    "gemma4_text": {"enable_moe_block": True, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["moe", "attention", "moe", "mamba", "moe"],
        "num_hidden_layers": None,
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * 3, "num_dense_layers": 1},
    "deepseek_v4": {"layer_types": None, "num_key_value_heads": None},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of `model_type` with small values; in a composite config, the text part has them."""
    cls = CONFIG_MAPPING[model_type]
    text = cls.sub_configs.get("text_config")
    if text is not None:
        inner = tiny_config(text.model_type, **changes)
        return cls(text_config=inner.to_dict())
    default = cls()
    default.allow_global_per_layer_attribute_access = True
    known = {name: value for name, value in SHRUNK.items() if hasattr(default, name)}
    if "qk_rope_head_dim" in known:
        # Latent attention: rotary embeddings turn only these, and every head has its own keys.
        known["head_dim"] = known["qk_rope_head_dim"]
        known["num_key_value_heads"] = known["num_attention_heads"]
    known.update(DIFFERENT.get(model_type, {}))
    known.update(changes)
    return cls(**{name: value for name, value in known.items() if value is not None})


def save_tiny(
    model_type: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Write a random checkpoint of `model_type` into `folder` and return its model."""
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    model = cls(config).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval().save_pretrained(folder)
    return model
