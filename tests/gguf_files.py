"""Writes GGUF files of tiny models as llama.cpp's convert_hf_to_gguf.py does.

They have its names, its order of dimensions, its permutation of the rows of queries and keys for
the architectures in `PERMUTED`, and its separate gates and ups for gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
}
PERMUTED = ("mixtral", "granitemoe")  # the converters of these derive from Llama's
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
Choose = Callable[[str], Kind]


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    choose: Choose = lambda name: Kind.F32,
    *,
    fields: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    one_tensor_an_expert: bool = False,
    parts: int = 1,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write `model` and return its tensors by llama.cpp's names.

    `choose` gives the type of a matrix by its name; vectors stay in float32.
    """
    tensors = llama_cpp_tensors(model, one_tensor_an_expert)
    size = -(-len(tensors) // parts)
    writer = gguf.GGUFWriter(
        file, ARCHITECTURES[model.config.model_type], split_max_tensors=size if parts > 1 else 0
    )
    write_fields(writer, model)
    fields(writer)
    for name, value in tensors.items():
        kind = choose(name) if value.ndim > 1 else Kind.F32
        if kind in (Kind.F32, Kind.F16):
            writer.add_tensor(name, value.astype(np.float32 if kind == Kind.F32 else np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_fields(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """The metadata that the converter takes from a config."""
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + (config.model_type == "glm4_moe"))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(next(getattr(config, n) for n in COUNTS if hasattr(config, n)))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type in PERMUTED:
        writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    else:
        writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    if config.model_type in ("glm4_moe", "minimax_m2"):
        part = config.rope_parameters["partial_rotary_factor"]
        writer.add_rope_dimension_count(int(model.model.layers[0].self_attn.head_dim * part))
    if config.model_type == "granitemoe":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "glm4_moe":
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_nextn_predict_layers(1)
    if config.model_type == "gpt_oss":
        rope = config.rope_parameters
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def llama_cpp_tensors(
    model: PreTrainedModel, one_tensor_an_expert: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """The model's tensors as the converter names and arranges them."""
    config = model.config
    arch = next(
        k for k, n in gguf.MODEL_ARCH_NAMES.items() if n == ARCHITECTURES[config.model_type]
    )
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    out: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            for projection, part in _projections(name, value, config.model_type == "gpt_oss"):
                layer, suffix = name.split(".")[2], "bias" if name.endswith("_bias") else "weight"
                stem = f"blk.{layer}.ffn_{projection}"
                if one_tensor_an_expert:
                    for expert, one in enumerate(part):
                        out[f"{stem}.{expert}.{suffix}"] = one.contiguous().numpy()
                else:
                    out[f"{stem}_exps.{suffix}"] = part.contiguous().numpy()
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("router.weight"):
            target = f"blk.{name.split('.')[2]}.ffn_gate_inp.weight"
        if name.endswith("e_score_correction_bias"):
            target = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        if name.endswith(".sinks"):
            target += ".weight"
        if config.model_type in PERMUTED and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads
            value = _permute(value, heads if ".q_proj" in name else config.num_key_value_heads)
        if name.endswith("shared_expert_gate.weight"):
            value = value.squeeze()
        out[target] = value.contiguous().numpy()
    if config.model_type == "glm4_moe":  # a tensor of the layer that predicts a second token
        out[f"blk.{config.num_hidden_layers}.nextn.eh_proj.weight"] = np.ones((4, 32), np.float32)
    return out


def _projections(name: str, value: Tensor, interleaved: bool) -> list[tuple[str, Tensor]]:
    """The projections in an expert parameter, down or gate and up, each as [E, out, in]."""
    if interleaved and value.dim() == 3:  # gpt-oss also has its matrices as [in, out]
        value = value.transpose(1, 2)
    if ".down_proj" in name:
        return [("down", value)]
    if interleaved:
        return [("gate", value[:, ::2]), ("up", value[:, 1::2])]
    return list(zip(("gate", "up"), value.chunk(2, dim=1), strict=True))


def _permute(weight: Tensor, heads: int) -> Tensor:
    """Permute rows as LlamaModel.permute in convert_hf_to_gguf.py does."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .transpose(1, 2)
        .reshape(weight.shape)
    )


BPE_VOCABULARY = 272  # of a model with `add_bpe`


def add_bpe(writer: gguf.GGUFWriter) -> None:
    """Add a byte-level tokenizer with a few merges, Qwen's marks of turns, and a chat template."""
    words, marks = ["he", "ll", "hell", "hello"], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*bytes_to_unicode().values(), *words, *marks]
    unused = [f"<|unused{i}|>" for i in range(BPE_VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([1] * 260 + [3] * 3 + [5] * len(unused))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_eos_token_id(262)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 260)
    writer.add_pad_token_id(260)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Add a tokenizer of pieces with scores, which falls back on single bytes."""
    letters, pieces = list("\u2581helowrd"), ["he", "ll", "hell", "hello", "\u2581hello"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *pieces]
    )
    writer.add_token_scores([0.0] * 259 + [-1e3] * 8 + [-1.0, -2.0, -3.0, -4.0, -5.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 13)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def write_qwen35moe(file: Path, kind: Kind) -> None:
    """Write a tiny Qwen3.5 MoE with random tensors."""
    hidden, inner, experts, vocabulary = 64, 32, 8, BPE_VOCABULARY
    value_heads, key_heads, width = 4, 2, 16
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, hidden),
        "output.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
    }
    for layer, full in enumerate((False, True, False, True)):
        block = {
            "attn_norm.weight": (hidden,),
            "post_attention_norm.weight": (hidden,),
            "ffn_gate_inp.weight": (experts, hidden),
            "ffn_gate_exps.weight": (experts, inner, hidden),
            "ffn_up_exps.weight": (experts, inner, hidden),
            "ffn_down_exps.weight": (experts, hidden, inner),
            "ffn_gate_inp_shexp.weight": (hidden,),
            "ffn_gate_shexp.weight": (inner, hidden),
            "ffn_up_shexp.weight": (inner, hidden),
            "ffn_down_shexp.weight": (hidden, inner),
        }
        if full:
            block |= {
                "attn_q.weight": (2 * 4 * width, hidden),
                "attn_k.weight": (2 * width, hidden),
                "attn_v.weight": (2 * width, hidden),
                "attn_output.weight": (hidden, 4 * width),
                "attn_q_norm.weight": (width,),
                "attn_k_norm.weight": (width,),
            }
        else:
            values, mixed = value_heads * width, (2 * key_heads + value_heads) * width
            block |= {
                "attn_qkv.weight": (mixed, hidden),
                "attn_gate.weight": (values, hidden),
                "ssm_alpha.weight": (value_heads, hidden),
                "ssm_beta.weight": (value_heads, hidden),
                "ssm_conv1d.weight": (mixed, 4),
                "ssm_norm.weight": (width,),
                "ssm_out.weight": (hidden, values),
                "ssm_a": (value_heads,),
                "ssm_dt.bias": (value_heads,),
            }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    writer = gguf.GGUFWriter(file, "qwen35moe")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(4)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_uint32("qwen35moe.full_attention_interval", 2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(width)
    writer.add_ssm_group_count(key_heads)
    writer.add_ssm_time_step_rank(value_heads)
    writer.add_ssm_inner_size(value_heads * width)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_array("qwen35moe.rope.dimension_sections", [2, 1, 1, 0])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_feed_forward_length(inner)
    add_bpe(writer)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = generator.normal(0, 0.1, shape).astype(np.float32)
        if "norm" in name:
            value += 1
        if name.endswith("ssm_a"):
            value = -np.exp(value)
        packed = kind != Kind.F32 and value.ndim > 1 and shape[-1] % 32 == 0
        if packed:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def upcycle_gguf(dense: Path, file: Path, experts: int) -> None:
    """Write a dense Llama's GGUF as that of a Mixtral, with each FFN's blocks `experts` times."""
    reader = gguf.GGUFReader(dense)
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")):
            continue
        kind, inner = field.types[0], field.types[-1]
        writer.add_key_value(name, field.contents(), kind, inner if len(field.types) > 1 else None)
    layers = reader.fields["llama.block_count"].contents()
    hidden = reader.fields["llama.embedding_length"].contents()
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    for layer in range(layers):
        writer.add_tensor(
            f"blk.{layer}.ffn_gate_inp.weight", np.zeros((experts, hidden), dtype=np.float32)
        )
    for tensor in reader.tensors:
        name, data = tensor.name, tensor.data
        if ".ffn_" in name and ".ffn_norm" not in name:
            name, data = name.replace(".weight", "_exps.weight"), np.stack([data] * experts)
        writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
