"""The demo's checkpoint as a GGUF file for llama.cpp.

Metadata and tokenizer are those of the file that the demo's weights come from; the tensors are
those of the Mixtral made of it, named and arranged as llama.cpp's converter does for Mixtral (the
architecture `llama` with experts, all experts of a layer in one tensor).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from torch import Tensor

from offload.model import demo

# What is stored how: experts, attention, and the token table that is also the head. llama.cpp's
# quantiser, too, gives the head more bits than the rest.
MIXES = {
    "BF16": (Kind.BF16, Kind.BF16, Kind.BF16),
    "Q8_0": (Kind.Q8_0, Kind.Q8_0, Kind.Q8_0),
    "Q4_1": (Kind.Q4_1, Kind.Q4_1, Kind.Q8_0),
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def write_demo(file: Path, mix: str) -> None:
    """Write the demo with the kinds of `mix`, whole or not at all."""
    folder, original = demo.checkpoint(), gguf.GGUFReader(demo.fetch_gguf())
    experts, attention, table = MIXES[mix]
    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama", use_temp_file=True)
    for name, field in original.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind, inner = field.types[0], field.types[-1]
            more = inner if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, more)
    config = json.loads((folder / "config.json").read_text())
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    tensors = _Checkpoint(folder)
    _add(writer, "token_embd.weight", tensors["model.embed_tokens.weight"], table)
    _add(writer, "output_norm.weight", tensors["model.norm.weight"], Kind.F32)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, ours in PARTS.items():
            value = tensors[f"{prefix}{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                value = _permuted(value, heads[ours[-1]])
            plain = "norm" in ours or ours == "ffn_gate_inp"
            _add(writer, f"blk.{layer}.{ours}.weight", value, Kind.F32 if plain else attention)
        for theirs, ours in EXPERTS.items():
            names = (
                f"{prefix}block_sparse_moe.experts.{expert}.{theirs}.weight"
                for expert in range(config["num_local_experts"])
            )
            stacked = torch.stack([tensors[name] for name in names])  # [E, out, in]
            _add(writer, f"blk.{layer}.{ours}.weight", stacked, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


class _Checkpoint:
    """Tensors by name, from whichever file holds them."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self._files: dict[str, str] = index["weight_map"]
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._folder / self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.float()


def _add(writer: gguf.GGUFWriter, name: str, value: Tensor, kind: Kind) -> None:
    writer.add_tensor(name, gguf.quantize(value.numpy(), kind), raw_dtype=kind)


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order for rotary embeddings: pairs lie together."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
