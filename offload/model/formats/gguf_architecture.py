"""llama.cpp's architectures that are read here, and how each differs.

Knows: their names in GGUF and in transformers. Does not know: how a config or a tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offload.errors import UnsupportedModelError
from offload.model.formats.gguf_part import GgufFile


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
