"""The models whose shapes are measured.

Knows: configs, in full and tiny, and how their routers behave. Does not know: packs, engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from offload.cache.trace.synthetic import Routing

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
RECALL = 0.85  # of guesses one layer ahead: 80-90% in arXiv 2312.17238, figure 2


@dataclass(frozen=True)
class Case:
    """One model: how its config is made for a number of layers, and what a router does."""

    name: str
    config: Callable[[int], PreTrainedConfig]
    tiny: Callable[[int], PreTrainedConfig]
    layers: int
    experts: int
    top_k: int
    routing: Routing

    def config_of(self, layers: int, rehearse: bool) -> PreTrainedConfig:
        return self.tiny(layers) if rehearse else self.config(layers)


# Routing: LRU then hits 42% and 61% of Mixtral's experts at 25 and 50% resident, where arXiv
# 2312.17238 has 40 and 60; 67% of Qwen3-30B's at 13%, where tinyserve has 66. Nothing is published
# for gpt-oss-120b, which is given Qwen3's.
MIXTRAL = Case(
    "Mixtral-8x7B",
    lambda layers: MixtralConfig(num_hidden_layers=layers),
    lambda layers: MixtralConfig(num_hidden_layers=layers, intermediate_size=96, **TINY),
    layers=32,
    experts=8,
    top_k=2,
    routing=Routing(stickiness=0.25, skew=0.3, recall=RECALL),
)
QWEN3 = Case(
    "Qwen3-30B-A3B",
    lambda layers: Qwen3MoeConfig(
        num_hidden_layers=layers,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    lambda layers: Qwen3MoeConfig(
        num_hidden_layers=layers,
        moe_intermediate_size=32,
        head_dim=16,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        **TINY,
    ),
    layers=48,
    experts=128,
    top_k=8,
    routing=Routing(stickiness=0.5, skew=1.0, recall=RECALL),
)
GPT_OSS = Case(
    "gpt-oss-120b",
    lambda layers: GptOssConfig(num_hidden_layers=layers),
    lambda layers: GptOssConfig(
        num_hidden_layers=layers, intermediate_size=64, head_dim=16, **TINY
    ),
    layers=36,
    experts=128,
    top_k=4,
    routing=Routing(stickiness=0.5, skew=1.0, recall=RECALL),
)
CASES = (QWEN3, MIXTRAL, GPT_OSS)
