"""A synthetic pack of Qwen3's MoE as a GGUF file for llama.cpp: the same model, weight by weight.

Experts of 4 bits without offsets become Q4_0: a group of 64 columns is two blocks with one scale.
The rest is BF16. There is no vocabulary: ids go in and logits come out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from offload.quant.codes import unpack
from offload.quant.pack import Pack
from offload.quant.record import MatrixView, view_record

BLOCK = 32  # columns of a Q4_0 block
PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def write_shape(folder: Path, file: Path) -> None:
    """Write the pack in `folder`, whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe", use_temp_file=False)
    config = AutoConfig.from_pretrained(folder)
    _add_numbers(writer, config)
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                _add_dense(writer, name.removesuffix(".weight"), tensors.get_tensor(name))
    with contextlib.closing(Pack(folder)) as pack:
        for layer in range(len(pack.info.layers)):
            for name, value in _experts(pack, layer):
                writer.add_tensor(f"blk.{layer}.{name}.weight", value, raw_dtype=Kind.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def _add_numbers(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _add_dense(writer: gguf.GGUFWriter, name: str, value: Tensor) -> None:
    prefix = ""
    if name.startswith("model.layers."):
        _, _, layer, name = name.split(".", 3)
        prefix = f"blk.{layer}."
    kind = Kind.F32 if value.dim() == 1 or name == "mlp.gate" else Kind.BF16
    stored = gguf.quantize(value.float().numpy(), kind)
    writer.add_tensor(f"{prefix}{PARTS[name]}.weight", stored, raw_dtype=kind)


def _experts(pack: Pack, layer: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The name and bytes [E, rows, bytes of a row] of each of a layer's matrices."""
    layout = pack.info.layout_of(layer)
    parts: dict[str, list[Tensor]] = {}
    for expert in range(pack.info.layers[layer].num_experts):
        views = view_record(pack.record(layer, expert), layout)
        up, down = (_as_q4_0(views[matrix.name]) for matrix in layout.matrices)
        gate, up = up.chunk(2)
        for name, value in (("gate", gate), ("up", up), ("down", down)):
            parts.setdefault(f"ffn_{name}_exps", []).append(value)
    for name, values in parts.items():
        yield name, torch.stack(values).numpy()


def _as_q4_0(view: MatrixView) -> Tensor:
    """Rows [N, K / 32 * 18] of blocks: a float16 scale, and the low nibbles of 16 columns first."""
    assert view.scales is not None
    rows, columns = view.layout.rows, view.layout.columns
    codes = unpack(view.weight, 4)[:rows].view(rows, columns // BLOCK, BLOCK)
    packed = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    scales, offsets = view.scales[:, :rows].unbind(-1)  # [K/g, N]
    assert not offsets.any(), "Q4_0 has no offsets"
    scales = scales.t().repeat_interleave(view.layout.group_size // BLOCK, dim=1).half()
    stored = scales.contiguous().view(torch.uint8).view(rows, columns // BLOCK, 2)
    return torch.cat((stored, packed), dim=2).flatten(1)
