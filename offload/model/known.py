"""The models that people run: short names, ids on the hub, and the values of their config.json.

With these values `offload plan` needs no network. They were compared with the config.json files on
huggingface.co, some of them in copies of the repositories, and with the defaults of transformers'
config classes; `tests/offload/model/test_known.py` counts the weights. What ollama's names stand
for comes from ollama.com and from the documentation of Qwen3.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A published model."""

    name: str  # short; what users type
    id: str  # on the hub
    model_type: str
    values: dict[str, Any]  # of config.json
    weights: int  # without layers that predict a second token
    download_gb: float = 0.0  # 10^9 bytes; 0 if they are the weights at 16 bits
    also: tuple[str, ...] = ()  # other ids of models of the same sizes
    ollama: tuple[str, ...] = ()  # what ollama calls `id`

    @cached_property
    def download_bytes(self) -> int:
        return round(self.download_gb * 1e9) or 2 * self.weights


_MIXTRAL = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
_QWEN3 |= {"max_position_embeddings": 262144}
_GPT_OSS = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64}
_GPT_OSS |= {"num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4}
_DEEPSEEK = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
_DEEPSEEK |= {"v_head_dim": 128, "max_position_embeddings": 163840}
_GLM = {"vocab_size": 151552, "head_dim": 128, "num_attention_heads": 96, "num_key_value_heads": 8}
_GLM |= {"n_shared_experts": 1, "num_experts_per_tok": 8, "attention_bias": True}

KNOWN = (
    KnownModel(
        "olmoe",
        "allenai/OLMoE-1B-7B-0125-Instruct",
        "olmoe",
        {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024}
        | {"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096},
        6_919_161_856,
        also=("allenai/OLMoE-1B-7B-0924", "allenai/OLMoE-1B-7B-0924-Instruct"),
    ),
    KnownModel(
        "lfm2-8b-a1b",
        "LiquidAI/LFM2-8B-A1B",
        "lfm2_moe",
        {"vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 7168}
        | {"moe_intermediate_size": 1792, "num_hidden_layers": 24, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "num_experts": 32, "num_experts_per_tok": 4}
        | {
            "num_dense_layers": 2,
            "max_position_embeddings": 128000,
            "layer_types": [
                "full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv"
                for layer in range(24)
            ],
        },
        8_339_929_856,
    ),
    KnownModel(
        "deepseek-v2-lite",
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        "deepseek_v2",
        _DEEPSEEK
        | {"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944}
        | {"moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2}
        | {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None},
        15_706_484_224,
        also=("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct"),
        ollama=("deepseek-v2", "deepseek-v2:16b"),
    ),
    KnownModel(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        "gpt_oss",
        _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
        20_914_757_184,
        13.8,
        ollama=("gpt-oss", "gpt-oss:20b"),
    ),
    KnownModel(
        "ernie-4.5-21b-a3b",
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "ernie4_5_moe",
        {"vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288}
        | {"moe_intermediate_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 20}
        | {"num_key_value_heads": 4, "moe_num_experts": 64, "moe_k": 6}
        | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131072},
        21_825_437_888,
        also=("baidu/ERNIE-4.5-21B-A3B-Thinking",),
    ),
    KnownModel(
        "glm-4.7-flash",
        "zai-org/GLM-4.7-Flash",
        "glm4_moe_lite",
        {"vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240}
        | {"moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20}
        | {"num_key_value_heads": 20, "n_routed_experts": 64, "n_shared_experts": 1}
        | {"num_experts_per_tok": 4, "kv_lora_rank": 512, "q_lora_rank": 768}
        | {"max_position_embeddings": 202752},
        29_943_390_976,
        62.5,
        ollama=("glm-4.7-flash:latest",),
    ),
    KnownModel(
        "qwen3-30b-a3b",
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        _QWEN3
        | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
        | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"max_position_embeddings": 40960},
        30_532_122_624,
    ),
    KnownModel(
        "qwen3-coder-30b-a3b",
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "qwen3_moe",
        _QWEN3
        | {"hidden_size": 2048, "intermediate_size": 5472, "moe_intermediate_size": 768}
        | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
        30_532_122_624,
        also=("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Thinking-2507"),
        ollama=("qwen3-coder", "qwen3-coder:30b"),
    ),
    KnownModel(
        "phi-3.5-moe",
        "microsoft/Phi-3.5-MoE-instruct",
        "phimoe",
        {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True}
        | {"lm_head_bias": True, "max_position_embeddings": 131072},
        41_873_153_344,
    ),
    KnownModel(
        "mixtral-8x7b",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mixtral",
        _MIXTRAL
        | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768},
        46_702_792_704,
        also=("mistralai/Mixtral-8x7B-v0.1",),
        ollama=("mixtral", "mixtral:8x7b"),
    ),
    KnownModel(
        "qwen3-next-80b-a3b",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "qwen3_next",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5120}
        | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
        | {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10}
        | {"max_position_embeddings": 262144},
        79_674_391_296,
        162.7,
        also=("Qwen/Qwen3-Next-80B-A3B-Thinking",),
        ollama=("qwen3-next", "qwen3-next:80b"),
    ),
    KnownModel(
        "glm-4.5-air",
        "zai-org/GLM-4.5-Air",
        "glm4_moe",
        _GLM
        | {"hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408}
        | {"num_hidden_layers": 46, "n_routed_experts": 128, "first_k_dense_replace": 1}
        | {"max_position_embeddings": 131072},
        106_852_245_504,
        221.0,
    ),
    KnownModel(
        "gpt-oss-120b",
        "openai/gpt-oss-120b",
        "gpt_oss",
        _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
        116_829_156_672,
        65.2,
        ollama=("gpt-oss:120b",),
    ),
    KnownModel(
        "mixtral-8x22b",
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        "mixtral",
        _MIXTRAL
        | {"vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384}
        | {"num_hidden_layers": 56, "num_attention_heads": 48, "max_position_embeddings": 65536},
        140_630_071_296,
        ollama=("mixtral:8x22b",),
    ),
    KnownModel(
        "minimax-m2",
        "MiniMaxAI/MiniMax-M2",
        "minimax_m2",
        {"vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "head_dim": 128}
        | {"num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8}
        | {"num_local_experts": 256, "num_experts_per_tok": 8, "max_position_embeddings": 196608},
        228_703_644_928,
        230.0,
        ollama=("minimax-m2:cloud",),
    ),
    KnownModel(
        "qwen3-235b-a22b",
        "Qwen/Qwen3-235B-A22B",
        "qwen3_moe",
        _QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536}
        | {"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4}
        | {"max_position_embeddings": 40960},
        235_093_634_560,
        ollama=("qwen3:235b", "qwen3:235b-a22b"),
    ),
    KnownModel(
        "glm-4.6",
        "zai-org/GLM-4.6",
        "glm4_moe",
        _GLM
        | {"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536}
        | {"num_hidden_layers": 92, "n_routed_experts": 160, "first_k_dense_replace": 3}
        | {"use_qk_norm": True, "max_position_embeddings": 202752},
        352_797_829_120,
        714.0,
        also=("zai-org/GLM-4.5", "zai-org/GLM-4.7"),
        ollama=("glm-4.6:cloud",),
    ),
    KnownModel(
        "qwen3-coder-480b-a35b",
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        "qwen3_moe",
        _QWEN3
        | {"hidden_size": 6144, "intermediate_size": 8192, "moe_intermediate_size": 2560}
        | {"num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8}
        | {"num_experts": 160},
        480_154_875_392,
        ollama=("qwen3-coder:480b",),
    ),
    KnownModel(
        "deepseek-v3",
        "deepseek-ai/DeepSeek-V3-0324",
        "deepseek_v3",
        _DEEPSEEK
        | {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432}
        | {"moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128}
        | {"num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
        | {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
        | {"q_lora_rank": 1536},
        671_026_419_200,
        688.6,
        also=(
            "deepseek-ai/DeepSeek-V3",
            "deepseek-ai/DeepSeek-V3.1",
            "deepseek-ai/DeepSeek-R1",
            "deepseek-ai/DeepSeek-R1-0528",
        ),
    ),
)
BY_NAME = {known.name: known for known in KNOWN}
BY_ID = {id.casefold(): known for known in KNOWN for id in (known.id, *known.also)}
BY_OLLAMA = {name: known.id for known in KNOWN for name in known.ollama} | {
    **dict.fromkeys(("qwen3:30b", "qwen3:30b-a3b"), "Qwen/Qwen3-30B-A3B-Thinking-2507"),
    **dict.fromkeys(
        ("deepseek-coder-v2", "deepseek-coder-v2:16b"),
        "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
    ),
    "deepseek-v3:671b": "deepseek-ai/DeepSeek-V3",
    "deepseek-v3.1:671b": "deepseek-ai/DeepSeek-V3.1",
    "deepseek-r1:671b": "deepseek-ai/DeepSeek-R1",
}
