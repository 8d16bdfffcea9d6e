"""Published models: the values of their config.json, and how many weights they have."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


@dataclass(frozen=True)
class Published:
    """A published model.

    `weights` counts all of them. `cut` has the values (layers, experts, vocabulary) of a model that
    is small enough for a test to make a pack of it.
    """

    model_type: str
    values: dict[str, Any]
    weights: int
    cut: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)  # more of config.json

    def config(self, **changes: Any) -> PreTrainedConfig:
        cls = CONFIG_MAPPING[self.model_type]
        return cls(**{**self.values, "dtype": "bfloat16", **changes})

    def save_as_published(self, folder: Path) -> None:
        """Write config.json as the hub has it, including how the weights are quantised."""
        self.config().save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **self.beside}))


FEW = {"num_hidden_layers": 1, "num_experts_per_tok": 1, "vocab_size": 512}
MIXTRAL = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}
QWEN = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128}
GPT_OSS = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64}
GPT_OSS |= {"num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4}
GROUPS = {"n_group": 1, "topk_group": 1}

PUBLISHED = {
    "Mixtral-8x7B": Published(
        "mixtral",
        MIXTRAL
        | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_experts_per_tok": 2},
        46_702_792_704,
        FEW | {"num_local_experts": 1},
    ),
    "Mixtral-8x22B": Published(
        "mixtral",
        MIXTRAL
        | {"vocab_size": 32000, "hidden_size": 6144, "intermediate_size": 16384}
        | {"num_hidden_layers": 56, "num_attention_heads": 48, "num_experts_per_tok": 2},
        140_620_634_112,
        FEW | {"num_local_experts": 1},
    ),
    "Qwen3-30B-A3B": Published(
        "qwen3_moe",
        QWEN
        | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
        | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_experts_per_tok": 8},
        30_532_122_624,
        FEW | {"num_experts": 4},
    ),
    "Qwen3-235B-A22B": Published(
        "qwen3_moe",
        QWEN
        | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536}
        | {"num_hidden_layers": 94, "num_attention_heads": 64, "num_experts_per_tok": 8},
        235_093_634_560,
        FEW | {"num_experts": 2},
    ),
    "gpt-oss-20b": Published(
        "gpt_oss",
        GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
        20_914_757_184,
        FEW | {"num_local_experts": 2},
    ),
    "gpt-oss-120b": Published(
        "gpt_oss",
        GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
        116_829_156_672,
        FEW | {"num_hidden_layers": 2, "num_local_experts": 2},
        {
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            }
        },
    ),
    "DeepSeek-V3": Published(
        "deepseek_v3",
        {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432}
        | {"moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128}
        | {"num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
        | {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        | {"qk_nope_head_dim": 128, "v_head_dim": 128},
        671_026_419_200,  # without the layer that predicts a second token
        FEW | GROUPS | {"n_routed_experts": 2, "first_k_dense_replace": 0},
        {
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModel": "modeling_deepseek.DeepseekV3Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
        },
    ),
    "GLM-4.5-Air": Published(
        "glm4_moe",
        {"vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "head_dim": 128}
        | {"moe_intermediate_size": 1408, "num_hidden_layers": 46, "num_attention_heads": 96}
        | {"num_key_value_heads": 8, "n_routed_experts": 128, "n_shared_experts": 1}
        | {"num_experts_per_tok": 8, "first_k_dense_replace": 1, "attention_bias": True},
        106_852_245_504,  # 106B; without the layer that predicts a second token
        FEW | GROUPS | {"n_routed_experts": 2, "first_k_dense_replace": 0},
    ),
    "OLMoE-1B-7B": Published(
        "olmoe",
        {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024}
        | {"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"num_experts": 64, "num_experts_per_tok": 8},
        6_919_161_856,
        FEW | {"num_experts": 4},
    ),
}
