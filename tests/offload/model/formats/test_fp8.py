"""Float8 checkpoints are read as transformers dequantises them, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import offload
from offload import CheckpointError, OffloadError
from offload.model.formats import scaled
from offload.model.formats.safetensors import SafetensorsSource
from offload.model.formats.scaled import Fp8Source
from offload.model.sources import read_config
from tests.tiny import save_tiny

FILE = "model.safetensors"
BLOCK = (16, 32)
PROMPT = torch.randint(3, 120, (1, 13), generator=torch.Generator().manual_seed(1))


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> float8 values and factors [..., ceil(N / rows), ceil(K / columns)]."""
    rows, columns = weight.shape[-2:]
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    padded = torch.zeros(*weight.shape[:-2], grid[0] * block[0], grid[1] * block[1])
    padded[..., :rows, :columns] = weight
    blocks = padded.unflatten(-1, (grid[1], block[1])).unflatten(-3, (grid[0], block[0]))
    scale = blocks.abs().amax((-3, -1)) / 448
    spread = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    values = weight / spread[..., :rows, :columns]
    return values.to(torch.float8_e4m3fn), scale


def make_fp8(
    folder: Path,
    scales: Callable[[Tensor], Tensor] = lambda scale: scale,
    suffix: str = "_scale_inv",
) -> Path:
    """Quantise the matrices of the layers of a checkpoint, but not its routers."""
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / FILE).items():
        if ".layers." not in name or value.dim() < 2 or ".gate.weight" in name:
            tensors[name] = value
            continue
        tensors[name], scale = quantise(value, BLOCK)
        tensors[name + suffix] = scales(scale)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_tiny("qwen3_moe", tmp_path / "fp8")
    return make_fp8(tmp_path / "fp8")


def _source(folder: Path, block: tuple[int, int] | None = BLOCK, **tensors: Tensor) -> Fp8Source:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    return Fp8Source(SafetensorsSource(folder), block)


def _of_transformers(weight: Tensor, scale: Tensor) -> Tensor:
    converted = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})
    return converted["weight"].to(torch.bfloat16)


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    return model(input_ids=PROMPT).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_a_checkpoint_gives_the_logits_of_its_dequantised_weights(
    model_type: str, tmp_path: Path
) -> None:
    folder = make_fp8_of(model_type, tmp_path / "fp8")
    model, _ = offload.load(
        folder, device="cpu", expert_bits=16, dtype=torch.float32, expert_slots=3
    )
    ours = _logits(model)
    model.offload.close()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    tensors = load_file(folder / FILE)
    plain = {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")}
    for name, value in plain.items():
        if value.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale_inv"]
            spread = scale.repeat_interleave(BLOCK[0], -2).repeat_interleave(BLOCK[1], -1)
            exact = value.float() * spread[..., : value.shape[-2], : value.shape[-1]]
            plain[name] = exact.to(torch.bfloat16)
    save_file(plain, folder / FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (ours - _logits(theirs)).abs().max() < 1e-5


def _compressed(shape: list[int], **weights: Any) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors for float8 weights, as llm-compressor writes
    it."""
    kind = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"strategy": "block", "block_structure": shape, **kind},
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None,
    }


def test_float8_of_compressed_tensors_is_read_exactly_as_fp8(tmp_path: Path) -> None:
    logits = []
    for name in ("fp8", "compressed"):
        folder = tmp_path / name
        save_tiny("qwen3_moe", folder, hidden_size=80)
        make_fp8(folder, suffix="_scale_inv" if name == "fp8" else "_scale")
        if name == "compressed":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = _compressed(list(BLOCK))
            (folder / "config.json").write_text(json.dumps(config))
        model, _ = offload.load(folder, device="cpu", expert_bits=16, dtype=torch.float32)
        logits.append(_logits(model))
        model.offload.close()
    assert torch.equal(*logits)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_scales_of_compressed_tensors_may_be_of_rows_or_tensors(
    strategy: str, tmp_path: Path
) -> None:
    folder = tmp_path / "compressed"
    save_tiny("qwen3_moe", folder)
    tensors: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, value in load_file(folder / FILE).items():
        tensors[name] = exact[name] = value
        if ".layers." in name and value.dim() == 2 and ".gate.weight" not in name:
            amax = value.abs().amax(1, keepdim=True) if strategy == "channel" else value.abs().max()
            scale = (amax / 448).to(torch.bfloat16).reshape(-1, 1)
            scale = scale if strategy == "channel" else scale.reshape(1)
            tensors[name] = (value / scale.float()).to(torch.float8_e4m3fn)
            tensors[name + "_scale"] = scale
            exact[name] = tensors[name].to(torch.bfloat16) * scale
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    compressed = _compressed([128, 128], strategy=strategy)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": compressed}))
    model, _ = offload.load(folder, device="cpu", expert_bits=16, dtype=torch.float32)
    ours = _logits(model)
    model.offload.close()
    save_file(exact, folder / FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (ours - _logits(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"format": "pack-quantized"},
        {"format": "float-quantized", "config_groups": {}},
        {"transform_config": {"config_groups": {"R1": {}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}},
    ],
)
def test_what_else_compressed_tensors_can_do_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {**_compressed([128, 128]), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OffloadError, match=r"already quantised \(compressed-tensors, .*not read"):
        read_config("it", tmp_path, trust_remote_code=False)


def make_fp8_of(model_type: str, folder: Path) -> Path:
    save_tiny(model_type, folder)
    return make_fp8(folder)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_weights_are_what_transformers_dequantises(
    scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    weight, scale = quantise(torch.randn(64, 96), BLOCK)
    scale = scale.to(scale_dtype)
    source = _source(tmp_path, weight=weight, weight_scale_inv=scale)
    theirs = _of_transformers(weight, scale)
    assert source.names() == ["weight"]
    assert source.dtype("weight") == torch.bfloat16
    assert torch.equal(source.read("weight"), theirs)


def test_scales_may_be_stored_as_exponents(tmp_path: Path) -> None:
    weight = torch.randn(32, 64).to(torch.float8_e4m3fn)
    exponents = torch.randint(110, 135, (2, 2), dtype=torch.uint8)
    theirs = _of_transformers(weight, exponents)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        source = _source(tmp_path, weight=weight, weight_scale_inv=scale)
        assert torch.equal(source.read("weight"), theirs)


def test_blocks_at_the_edges_may_be_cut(tmp_path: Path) -> None:
    """DeepSeek-V3 has a matrix of 576 rows in blocks of 128, which transformers refuses."""
    dense = torch.randn(40, 50)
    weight, scale = quantise(dense, BLOCK)
    assert scale.shape == (3, 2)
    ours = _source(tmp_path, weight=weight, weight_scale_inv=scale).read("weight")
    for row in range(40):
        for column in range(50):
            factor = scale[row // BLOCK[0], column // BLOCK[1]]
            assert ours[row, column] == (weight[row, column].float() * factor).to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_tensor_may_have_one_scale(
    shape: tuple[int, ...], suffix: str, kind: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.randn(24, 40).to(kind)
    scale = torch.full(shape, 0.37)
    source = _source(tmp_path, None, **{"weight": weight, "weight" + suffix: scale})
    assert torch.equal(source.read("weight"), (weight.float() * 0.37).to(torch.bfloat16))


def test_each_row_may_have_one_scale(tmp_path: Path) -> None:
    weight, scale = torch.randn(24, 40).to(torch.float8_e4m3fn), torch.rand(24, 1) + 0.5
    source = _source(tmp_path, None, weight=weight, weight_scale=scale)
    assert torch.equal(source.read("weight"), (weight.float() * scale).to(torch.bfloat16))


def test_a_single_number_may_be_stored_in_float8(tmp_path: Path) -> None:
    number, scale = torch.tensor(3.0).to(torch.float8_e4m3fn), torch.tensor(0.5)
    source = _source(tmp_path, None, number=number, number_scale=scale)
    assert torch.equal(source.read("number"), torch.tensor(1.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_matrix_without_weights_is_read_or_refused(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    weight = torch.empty(shape).to(torch.float8_e4m3fn)
    source = _source(tmp_path, None, weight=weight, weight_scale=torch.tensor(0.5))
    assert source.read("weight").shape == shape
    with pytest.raises(CheckpointError, match="does not fit weight"):
        _source(tmp_path, None, weight=weight, weight_scale=torch.ones(2, 2))


def test_large_tensors_are_dequantised_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = quantise(torch.randn(72, 50), BLOCK)
    source = _source(tmp_path, weight=weight, weight_scale_inv=scale)
    whole = source.read("weight")
    monkeypatch.setattr(scaled, "CHUNK_WEIGHTS", 50 * 33)
    assert torch.equal(source.read("weight"), whole)


@pytest.mark.parametrize("scale_shape", ["blocks", "expert", "expert matrix", "tensor"])
def test_a_slice_of_fused_experts_is_one_expert(scale_shape: str, tmp_path: Path) -> None:
    weight, scale = quantise(torch.randn(4, 32, 64), BLOCK)
    scales = {
        "blocks": scale,
        "expert": torch.rand(4) + 0.5,
        "expert matrix": torch.rand(4, 1, 1) + 0.5,
        "tensor": torch.tensor(0.5),
    }
    source = _source(tmp_path, up_proj=weight, up_proj_scale_inv=scales[scale_shape])
    whole = source.read("up_proj")
    spread = scales[scale_shape]
    if scale_shape == "blocks":
        spread = spread.repeat_interleave(BLOCK[0], 1).repeat_interleave(BLOCK[1], 2)
    elif scale_shape == "expert":
        spread = spread[:, None, None]
    assert torch.equal(whole, (weight.float() * spread).to(torch.bfloat16))
    for index in range(4):
        assert torch.equal(source.read_slice("up_proj", index), whole[index : index + 1])


def test_other_tensors_are_read_unchanged(tmp_path: Path) -> None:
    weight, scale = quantise(torch.randn(32, 64), BLOCK)
    norm = torch.randn(3, 5, dtype=torch.float16)
    source = _source(tmp_path, weight=weight, weight_scale_inv=scale, norm=norm)
    assert source.dtype("norm") == torch.float16
    assert source.shape("norm") == (3, 5)
    assert torch.equal(source.read("norm"), norm)
    assert torch.equal(source.read_slice("norm", 1), norm[1:2])


# --- damage --------------------------------------------------------------------------------------


def _change(folder: Path, change: Callable[[dict[str, Tensor], str], None]) -> str:
    """Change the tensors of a checkpoint, given the name of a float8 one."""
    tensors = load_file(folder / FILE)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert tensors[name].dtype == torch.float8_e4m3fn
    change(tensors, name)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return name


def _fails(folder: Path, match: str, kind: type[OffloadError] = CheckpointError) -> None:
    with pytest.raises(kind, match=match) as caught:
        offload.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_scale_is_named(checkpoint: Path) -> None:
    name = _change(checkpoint, lambda tensors, name: tensors.pop(name + "_scale_inv"))
    _fails(checkpoint, f"{name} is float8 and its scale .* is missing")


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (2, 3), (4,), (2, 2, 2), (2, 0)])
def test_a_scale_of_another_shape_is_named(shape: tuple[int, ...], checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        assert tensors[name + "_scale_inv"].shape == (2, 2)
        tensors[name + "_scale_inv"] = torch.ones(shape)

    name = _change(checkpoint, change)
    _fails(checkpoint, rf"{name}_scale_inv has shape .* does not fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_with_a_scale_that_is_no_number_is_named(value: float, checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name + "_scale_inv"][1, 0] = value

    _change(checkpoint, change)
    _fails(checkpoint, r"layers\.1\.mlp\.experts\.gate_up_proj, expert 2 has values that are not")


@pytest.mark.parametrize("size", [[16], "16", [16, 0], [16, "32"], [1.5, 2], {"a": 1}])
def test_a_block_size_that_is_not_two_sizes_is_refused(size: object, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (checkpoint / "config.json").write_text(json.dumps(config))
    _fails(checkpoint, "weight_block_size")


def test_another_method_is_refused_by_name(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(OffloadError, match=r"already quantised \(gptq\).* fp8 or mxfp4"):
        read_config("it", checkpoint, trust_remote_code=False)
