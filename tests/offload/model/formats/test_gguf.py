"""GGUF files become the model they were written from, an expert at a time."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.gguf import read_gguf_metadata

import offload
from offload import CheckpointError, OffloadError, SourceError, UnsupportedModelError
from offload.loading import load_tokenizer
from offload.model.demo import fetch_gguf
from offload.model.formats import gguf as gguf_module
from offload.model.formats.gguf import PLAIN, GgufFile, block_size
from offload.model.formats.gguf_config import save_config_files
from offload.model.formats.gguf_model import GgufSource
from offload.model.names import find
from offload.model.sources import read_config
from offload.options import LoadOptions
from tests.gguf_files import (
    ARCHITECTURES,
    BPE_VOCABULARY,
    add_bpe,
    add_sentencepiece,
    upcycle_gguf,
    write_gguf,
    write_qwen35moe,
)
from tests.tiny import EXPERTS, save_tiny

PROMPT = torch.randint(3, 120, (1, 13), generator=torch.Generator().manual_seed(1))
AS_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [], "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True},
    "granitemoe": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {
        "n_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "minimax_m2": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
        }
    },
}
TEXTS = ["hello world", "\u05e9\u05dc\u05d5\u05dd \U0001f389  two  spaces\n", "x\ty"]
QUANTISED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4]
PLAIN_KINDS = {Kind(kind) for kind in PLAIN}
CAN_BE_READ = [kind for kind in Kind if block_size(kind.value) is not None]


def _tiny(model_type: str, folder: Path, **changes: Any) -> PreTrainedModel:
    return save_tiny(model_type, folder, **{**AS_LLAMA_CPP.get(model_type, {}), **changes})


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=PROMPT).logits  # type: ignore[no-any-return]


def _ours(file: Path) -> Tensor:
    model, _ = offload.load(file, device="cpu", expert_bits=16, dtype=torch.float32, expert_slots=3)
    try:
        return _logits(model)
    finally:
        model.offload.close()


@torch.no_grad()
def _round_to_bfloat16(model: PreTrainedModel) -> None:
    """Round every matrix, but not the vectors and convolutions, which files have in float32."""
    for name, parameter in model.named_parameters():
        if parameter.squeeze().dim() > 1 and "conv1d" not in name:
            parameter.copy_(parameter.to(torch.bfloat16))


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_gives_the_logits_of_the_model_it_was_made_from(
    model_type: str, tmp_path: Path
) -> None:
    model = _tiny(model_type, tmp_path / "checkpoint")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    write_gguf(tmp_path / "tiny.gguf", model)
    assert (_ours(tmp_path / "tiny.gguf") - _logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_logits_are_those_of_transformers_own_reading(model_type: str, tmp_path: Path) -> None:
    """For architectures that transformers reads; it would make a dense Llama of a Mixtral."""
    model = _tiny(model_type, tmp_path / "checkpoint")
    write_gguf(tmp_path / "tiny.gguf", model, lambda name: Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", config=model.config, dtype=torch.float32
    )
    _round_to_bfloat16(theirs)
    assert (_ours(tmp_path / "tiny.gguf") - _logits(theirs)).abs().max() < 1e-5


def test_the_config_is_that_of_the_model(tmp_path: Path) -> None:
    for model_type in ARCHITECTURES:
        model = _tiny(model_type, tmp_path / model_type)
        write_gguf(tmp_path / "tiny.gguf", model)
        config = read_config("it", tmp_path / "tiny.gguf", trust_remote_code=False)
        for name in [
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "num_experts_per_tok",
            "vocab_size",
            "rms_norm_eps",
            "tie_word_embeddings",
            "rope_parameters",
            "max_position_embeddings",
            "num_local_experts",
            "num_experts",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "norm_topk_prob",
            "head_dim",
        ]:
            if hasattr(model.config, name):
                assert getattr(config, name) == getattr(model.config, name), (model_type, name)
        assert config.dtype == torch.float32


@pytest.mark.parametrize("parts", [1, 3])
def test_a_file_is_found_by_its_name_or_its_folder(parts: int, tmp_path: Path) -> None:
    model = _tiny("mixtral", tmp_path / "checkpoint")
    (tmp_path / "here").mkdir()
    write_gguf(tmp_path / "here" / "tiny.gguf", model, parts=parts)
    files = sorted((tmp_path / "here").iterdir())
    assert len(files) == parts
    for name in (tmp_path / "here", files[-1]):
        found = find(str(name), LoadOptions())
        assert (found.name, found.is_pack) == ("tiny", False)
        assert (_ours(name) - _logits(model)).abs().max() < 1e-5


def test_a_folder_with_several_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"several models: name one of a\.gguf, b\.gguf"):
        offload.load(tmp_path)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", _tiny("mixtral", tmp_path / "checkpoint"), parts=3)
    (tmp_path / "tiny-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf is missing"):
        offload.load(tmp_path / "tiny-00001-of-00003.gguf")


def test_files_with_a_tensor_for_each_expert_are_read(tmp_path: Path) -> None:
    model = _tiny("mixtral", tmp_path / "checkpoint")
    write_gguf(tmp_path / "old.gguf", model, one_tensor_an_expert=True)
    assert (_ours(tmp_path / "old.gguf") - _logits(model)).abs().max() < 1e-5


def test_a_quantised_file_is_computed_in_bfloat16(tmp_path: Path) -> None:
    write_gguf(tmp_path / "q.gguf", _tiny("mixtral", tmp_path / "c"), lambda name: Kind.Q4_0)
    model, tokenizer = offload.load(tmp_path / "q.gguf", device="cpu")
    assert (model.dtype, tokenizer) == (torch.bfloat16, None)
    model.offload.close()


def test_a_changed_file_has_another_pack(tmp_path: Path, home: Path) -> None:
    for kind in (Kind.Q4_0, Kind.Q8_0):
        write_gguf(tmp_path / "q.gguf", _tiny("mixtral", tmp_path / "c"), lambda name, k=kind: k)
        for _ in range(2):
            offload.load(tmp_path / "q.gguf", device="cpu")[0].offload.close()
    assert len(list((home / "packs").glob("*/manifest.json"))) == 2


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_an_architecture_with_rules_in_transformers_gives_its_logits(
    kind: Kind, tmp_path: Path
) -> None:
    """Qwen3.5, whose rules do more than rename, with random tensors."""
    write_qwen35moe(tmp_path / "tiny.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    assert type(theirs).__name__ == "Qwen3_5MoeForCausalLM"
    if kind != Kind.F32:
        _round_to_bfloat16(theirs)
    assert (_ours(tmp_path / "tiny.gguf") - _logits(theirs)).abs().max() < 1e-5


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "tokenizer", "ids"),
    [
        ("qwen3_moe", add_bpe, [259, 220, 86, 78, 81, 75, 67]),
        ("mixtral", add_sentencepiece, [1, 271, 259, 264, 263, 265, 262, 266]),
    ],
)
def test_the_tokenizer_in_a_file_is_that_of_the_pack(
    model_type: str,
    tokenizer: Callable[[gguf.GGUFWriter], None],
    ids: list[int],
    tmp_path: Path,
) -> None:
    model = _tiny(model_type, tmp_path / "c", vocab_size=BPE_VOCABULARY)
    write_gguf(tmp_path / "tiny.gguf", model, fields=tokenizer)
    ours, made = offload.load(tmp_path / "tiny.gguf", device="cpu")
    ours.offload.close()
    assert made is not None
    assert made("hello world").input_ids == ids
    for text in TEXTS:
        assert made.decode(made(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "qwen3_5_moe"])
def test_every_architecture_has_the_tokenizer_of_its_file(model_type: str, tmp_path: Path) -> None:
    if model_type in ARCHITECTURES:
        model = _tiny(model_type, tmp_path / "c", vocab_size=BPE_VOCABULARY)
        write_gguf(tmp_path / "tiny.gguf", model, fields=add_bpe)
    else:
        write_qwen35moe(tmp_path / "tiny.gguf", Kind.F32)
    save_config_files(tmp_path / "tiny.gguf", tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved", trust_remote_code=False)
    assert tokenizer is not None
    ids = tokenizer("hello 12<|im_end|>").input_ids
    assert ids == [259, 220, 16, 17, 262]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 12"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template.startswith("{% for m in messages %}")


def test_an_answer_ends_at_the_end_of_a_turn(tmp_path: Path) -> None:
    model = _tiny("qwen3_moe", tmp_path / "c", vocab_size=BPE_VOCABULARY)
    write_gguf(tmp_path / "tiny.gguf", model, fields=add_bpe)
    ours, tokenizer = offload.load(tmp_path / "tiny.gguf", device="cpu")
    ours.offload.close()
    assert tokenizer is not None
    assert ours.generation_config.eos_token_id == [262, 260]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_tokenizer_that_cannot_be_made_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a", "b"])

    write_gguf(tmp_path / "tiny.gguf", _tiny("mixtral", tmp_path / "c"), fields=unknown)
    capsys.readouterr()
    _fails(tmp_path / "tiny.gguf", CheckpointError, "of the kind 'rwkv'")
    assert capsys.readouterr().err == ""


# --- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTISED], ids=lambda k: k.name)
def test_tensors_are_what_the_gguf_library_reads(kind: Kind, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", _tiny("mixtral", tmp_path / "c"), lambda name: kind)
    ours = GgufFile(tmp_path / "tiny.gguf")
    theirs = gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    assert list(ours.tensors) == [tensor.name for tensor in theirs]
    for tensor in theirs:
        _compare(ours, tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))


def test_every_type_that_the_gguf_library_dequantises_is_read() -> None:
    theirs = set()
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
            theirs.add(kind)
    assert set(CAN_BE_READ) == theirs


@pytest.mark.parametrize("kind", sorted(set(CAN_BE_READ) - PLAIN_KINDS), ids=lambda k: k.name)
def test_random_blocks_are_what_the_gguf_library_reads(kind: Kind, tmp_path: Path) -> None:
    """The blocks are random, because the library cannot quantise to most types."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (4, 6, 512 // values, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(blocks.reshape(4, 6, -1), kind)
    finite = np.isfinite(wanted).reshape(4, 6, -1, values).all(-1)
    if kind in (Kind.MXFP4, Kind.NVFP4):  # a scale that is no number is given as none
        finite &= ~(blocks[..., : 1 if kind == Kind.MXFP4 else 4] == 0xFF).any(-1)
    blocks[~finite] = 0
    wanted = gguf.dequantize(blocks.reshape(4, 6, -1), kind)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up_exps.weight", blocks.reshape(4, 6, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert wanted.shape == (4, 6, 512)
    assert finite.mean() > 0.8
    for dtype in (torch.bfloat16, torch.float32):
        _compare(GgufFile(tmp_path / "k.gguf", dtype), "blk.0.ffn_up_exps.weight", wanted)


def _compare(ours: GgufFile, name: str, wanted: np.ndarray[Any, Any]) -> None:
    value = torch.from_numpy(wanted.copy()).to(ours.dtype(name))
    assert torch.isfinite(value).all()
    assert torch.equal(ours.read(name), value), name
    for index in range(len(wanted)):
        assert torch.equal(ours.read_slice(name, index), value[index : index + 1]), name


def test_large_tensors_are_dequantised_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "q.gguf", _tiny("mixtral", tmp_path / "c"), lambda name: Kind.Q5_1)
    whole = GgufFile(tmp_path / "q.gguf").read("token_embd.weight")
    monkeypatch.setattr(gguf_module, "CHUNK_WEIGHTS", 32 * 7)
    assert torch.equal(GgufFile(tmp_path / "q.gguf").read("token_embd.weight"), whole)


class Counted(GgufFile):
    """A GGUF file that counts the weights it dequantises."""

    weights = 0

    def read(self, name: str) -> Tensor:
        return self._count(super().read(name))

    def read_slice(self, name: str, index: int) -> Tensor:
        return self._count(super().read_slice(name, index))

    def _count(self, value: Tensor) -> Tensor:
        self.weights += value.numel()
        return value


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_slice_dequantises_one_expert(model_type: str, apart: bool, tmp_path: Path) -> None:
    model = _tiny(model_type, tmp_path / "c")
    write_gguf(tmp_path / "q.gguf", model, lambda name: Kind.Q8_0, one_tensor_an_expert=apart)
    file = Counted(tmp_path / "q.gguf")
    source = GgufSource(file, model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = source.read(name)
    for expert in range(EXPERTS):
        file.weights = 0
        part = source.read_slice(name, expert)
        assert torch.equal(part, whole[expert : expert + 1])
        assert file.weights == part.numel()
        # as [out, in], so that quantising adds in the same order as for any other architecture
        assert (part[0].t() if model_type == "gpt_oss" else part[0]).is_contiguous()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_parameter_is_the_one_that_was_written(model_type: str, tmp_path: Path) -> None:
    """The file is written with the names of the gguf library's table, and read without it."""
    model = _tiny(model_type, tmp_path / "c")
    write_gguf(tmp_path / "tiny.gguf", model)
    source = GgufSource(GgufFile(tmp_path / "tiny.gguf"), model)
    wanted = model.state_dict()
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert set(source.names()) == set(wanted)
    for name, value in wanted.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.read(name), value), name
        assert torch.equal(source.read_slice(name, len(value) - 1), value[-1:]), name


def test_metadata_is_what_transformers_reads(tmp_path: Path) -> None:
    model = _tiny("qwen3_moe", tmp_path / "c", vocab_size=BPE_VOCABULARY)
    write_gguf(tmp_path / "tiny.gguf", model, fields=add_bpe)
    file = GgufFile(tmp_path / "tiny.gguf")
    fields, names = read_gguf_metadata(str(tmp_path / "tiny.gguf"))
    assert (file.fields, list(file.tensors)) == (fields, list(names))


def test_a_pack_is_the_same_each_time_it_is_made(tmp_path: Path) -> None:
    """So are the files made from metadata: an interrupted making continues with equal bytes."""
    model = _tiny("qwen3_moe", tmp_path / "c", vocab_size=BPE_VOCABULARY)
    write_gguf(tmp_path / "tiny.gguf", model, lambda name: Kind.Q8_0, fields=add_bpe)
    packs = []
    for name in ("one", "two"):
        made, _ = offload.load(tmp_path / "tiny.gguf", device="cpu", pack_dir=tmp_path / name)
        made.offload.close()
        packs.append({f.name: f.read_bytes() for f in made.offload.pack.path.iterdir()})
    assert packs[0] == packs[1]


def test_a_block_whose_scale_is_no_number_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "q.gguf", _tiny("mixtral", tmp_path / "c"), lambda name: Kind.Q4_0)
    tensor = GgufFile(tmp_path / "q.gguf").tensors["blk.1.ffn_up_exps.weight"]
    data = bytearray((tmp_path / "q.gguf").read_bytes())
    one = 96 * 64 // 32 * 18  # bytes of an expert
    data[tensor.begin + 3 * one : tensor.begin + 3 * one + 2] = b"\xff\x7f"  # NaN in float16
    (tmp_path / "q.gguf").write_bytes(data)
    _fails(tmp_path / "q.gguf", CheckpointError, "gate_up_proj, expert 3 has values that are not")


# --- what is refused -----------------------------------------------------------------------------


def _fails(file: Path, kind: type[OffloadError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        offload.load(file, device="cpu")
    assert "\n" not in str(caught.value)


def _write_empty(file: Path, architecture: str) -> None:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    _write_empty(tmp_path / "dense.gguf", "llama")
    _fails(tmp_path / "dense.gguf", UnsupportedModelError, "not a Mixture-of-Experts model")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    _write_empty(tmp_path / "other.gguf", "deepseek2")
    _fails(tmp_path / "other.gguf", UnsupportedModelError, "'deepseek2'; llama, qwen2moe, qwen3moe")


def test_no_gguf_library_is_needed(tmp_path: Path) -> None:
    model = _tiny("mixtral", tmp_path / "c", vocab_size=BPE_VOCABULARY)
    write_gguf(tmp_path / "tiny.gguf", model, lambda name: Kind.MXFP4, fields=add_sentencepiece)
    program = (
        "import sys; sys.modules['gguf'] = None; import offload; "
        f"model, tokenizer = offload.load({str(tmp_path / 'tiny.gguf')!r}, device='cpu'); "
        "assert tokenizer('hello').input_ids; model.offload.close()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("number", [b"9", b"2"])
def test_a_missing_expert_is_refused(number: bytes, tmp_path: Path) -> None:
    """In an old file, which has a tensor for each expert."""
    file = tmp_path / "old.gguf"
    write_gguf(file, _tiny("mixtral", tmp_path / "c"), one_tensor_an_expert=True)
    names = b"blk.1.ffn_up.3.weight", b"blk.1.ffn_up." + number + b".weight"
    file.write_bytes(file.read_bytes().replace(*names))
    _fails(file, CheckpointError, "are not one series|is there twice")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    model = _tiny("mixtral", tmp_path / "c")
    model.config.tie_word_embeddings = False
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(64))
    write_gguf(tmp_path / "tiny.gguf", model)
    _fails(tmp_path / "tiny.gguf", UnsupportedModelError, "attn_q.bias that 'mixtral' in transf")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope', which is"),
        (lambda w: _replace(w, "expert_used_count", EXPERTS + 1), "num_experts_per_tok 9"),
        (lambda w: _replace(w, "expert_used_count", 0), "expert_used_count .* is 0"),
        (lambda w: _replace(w, "block_count", 2**31), "num_hidden_layers"),
        (lambda w: _replace(w, "attention.head_count", 7), "do not match"),
        (lambda w: _replace(w, "rope.dimension_count", 15), "unusable metadata"),
    ],
)
def test_impossible_metadata_is_refused(
    change: Callable[[gguf.GGUFWriter], None], match: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", _tiny("mixtral", tmp_path / "c"), fields=change)
    _fails(tmp_path / "tiny.gguf", OffloadError, match)


def _replace(writer: gguf.GGUFWriter, key: str, value: int) -> None:
    writer.kv_data[0].pop(f"llama.{key}")
    writer.add_uint32(f"llama.{key}", value)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "expert_used_count"])
def test_missing_metadata_is_named(key: str, tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "tiny.gguf",
        _tiny("mixtral", tmp_path / "c"),
        fields=lambda writer: writer.kv_data[0].pop(f"llama.{key}") and None,
    )
    _fails(tmp_path / "tiny.gguf", CheckpointError, f"llama.{key} in the metadata")


@pytest.mark.parametrize("count", [EXPERTS - 1, EXPERTS + 1, 2**31])
def test_metadata_that_does_not_match_the_weights_is_refused(count: int, tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "tiny.gguf",
        _tiny("mixtral", tmp_path / "c"),
        fields=lambda writer: _replace(writer, "expert_count", count),
    )
    _fails(tmp_path / "tiny.gguf", CheckpointError, "do not match")


def test_a_truncated_file_is_refused_at_any_length(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", _tiny("mixtral", tmp_path / "c"))
    data = (tmp_path / "tiny.gguf").read_bytes()
    header = data.index(b"output.weight") + 64
    for size in [0, 3, 4, *range(5, header, 97), header, len(data) // 2, len(data) - 1]:
        (tmp_path / "tiny.gguf").write_bytes(data[:size])
        _fails(tmp_path / "tiny.gguf", CheckpointError, "not a whole GGUF file|ends before|is emp")


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """Wherever bits are wrong, there is no other error, no hang and no huge allocation."""
    write_gguf(tmp_path / "tiny.gguf", _tiny("mixtral", tmp_path / "c"))
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    for at in range(0, data.index(b"output.weight") + 64, 3):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        (tmp_path / "tiny.gguf").write_bytes(damaged)
        with contextlib.suppress(OffloadError):
            GgufFile(tmp_path / "tiny.gguf")
            read_config("it", tmp_path / "tiny.gguf", trust_remote_code=False)


def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path: Path) -> None:
    """A reader that believes the length would walk over 2 ** 60 elements."""
    key = b"tokenizer.ggml.scores"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for kind in (0, 6, 8, 9):
        array = struct.pack("<IIQ", 9, kind, 2**60)
        (tmp_path / "long.gguf").write_bytes(head + array + b"\0" * 64)
        _fails(tmp_path / "long.gguf", CheckpointError, "not a whole GGUF file")


def test_an_architecture_that_is_no_text_is_refused(tmp_path: Path) -> None:
    key = b"general.architecture"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    (tmp_path / "odd.gguf").write_bytes(head + struct.pack("<IIQ", 9, 0, 2) + bytes([1, 2]))
    _fails(tmp_path / "odd.gguf", UnsupportedModelError, r"architecture \[1, 2\]")


# --- a file of llama.cpp's own making -----------------------------------------------------------


@pytest.mark.long
@pytest.mark.demo
def test_a_dense_file_of_llama_cpp_upcycled_answers_as_before(tmp_path: Path) -> None:
    """SmolLM2's blocks as llama.cpp wrote them, with each FFN twice and routers that weigh both."""
    dense = fetch_gguf()
    upcycle_gguf(dense, tmp_path / "moe.gguf", experts=2)
    model, tokenizer = offload.load(
        tmp_path / "moe.gguf",
        device="cpu",
        expert_bits=16,
        dtype=torch.float32,
        pack_dir=tmp_path / "packs",
    )
    assert tokenizer is not None
    text = offload.generate(
        model,
        tokenizer,
        [{"role": "user", "content": "What is the capital of France?"}],
        max_new_tokens=24,
        temperature=0.0,
    )
    prompt = tokenizer("The capital of France is Paris, and", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours = model(prompt).logits
        model.offload.close()
        theirs = AutoModelForCausalLM.from_pretrained(
            dense.parent, gguf_file=dense.name, dtype=torch.float32
        )
        _round_to_bfloat16(theirs)
        difference = (ours - theirs(prompt).logits).abs().max()
    assert "Paris" in text
    assert difference < 1e-3
