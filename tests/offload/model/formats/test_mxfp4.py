"""MXFP4 experts are read as transformers dequantises them, an expert at a time."""

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
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import offload
from offload import CheckpointError
from offload.model.formats import scaled
from offload.model.formats.safetensors import SafetensorsSource
from offload.model.formats.scaled import Mxfp4Source
from offload.model.odd import PACKED
from tests.tiny import EXPERTS, LAYERS, save_tiny

FILE = "model.safetensors"
NAME = "model.layers.1.mlp.experts.gate_up_proj"
PROMPT = torch.randint(3, 120, (1, 13), generator=torch.Generator().manual_seed(1))


def random_mxfp4(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(119, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    return blocks, scales


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny gpt-oss whose experts are MXFP4."""
    folder = tmp_path / "mxfp4"
    save_tiny("gpt_oss", folder, dtype=torch.bfloat16)
    tensors = load_file(folder / FILE)
    torch.manual_seed(0)
    for layer in range(LAYERS):
        for projection in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{projection}"
            experts, columns, rows = tensors.pop(name).shape
            tensors[name + "_blocks"], tensors[name + "_scales"] = random_mxfp4(
                experts, rows, columns
            )
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": skipped,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    return model(input_ids=PROMPT).logits  # type: ignore[no-any-return]


def test_a_checkpoint_gives_transformers_own_logits(checkpoint: Path) -> None:
    """Without a GPU, transformers dequantises the experts on loading as well."""
    model, _ = offload.load(
        checkpoint, device="cpu", expert_bits=16, dtype=torch.float32, expert_slots=3
    )
    ours = _logits(model)
    config = json.loads((model.offload.pack.path / "config.json").read_text())
    model.offload.close()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert config["quantization_config"] == {"quant_method": PACKED}
    assert (ours - _logits(theirs)).abs().max() < 1e-5


def test_weights_are_what_transformers_dequantises(checkpoint: Path) -> None:
    source = Mxfp4Source(SafetensorsSource(checkpoint))
    tensors = load_file(checkpoint / FILE)
    theirs = convert_moe_packed_tensors(tensors[NAME + "_blocks"], tensors[NAME + "_scales"])
    assert NAME in source.names()
    assert not any(name.endswith(("_blocks", "_scales")) for name in source.names())
    assert (source.shape(NAME), source.dtype(NAME)) == (tuple(theirs.shape), torch.bfloat16)
    assert torch.equal(source.read(NAME), theirs)


def test_every_code_and_exponent_is_what_the_standard_says() -> None:
    """Except the exponents 255, which is not a number, and 0, whose products bfloat16 rounds."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 254, 1, 1)
    scales = torch.arange(1, 255, dtype=torch.uint8).view(1, 254, 1).repeat(1, 1, 16)
    theirs = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(scaled.dequantise(codes, scales).float(), theirs.to(torch.bfloat16).float())
    nothing = torch.full((1, 1, 1), 255, dtype=torch.uint8)
    assert scaled.dequantise(codes[:, :1, :1], nothing).isnan().all()


class Counted(SafetensorsSource):
    """A source that notes how many experts it reads at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.experts: list[int] = []

    def read(self, name: str) -> Tensor:
        self.experts.append(len(super().read(name)))
        return super().read(name)

    def read_slice(self, name: str, index: int) -> Tensor:
        self.experts.append(len(super().read_slice(name, index)))
        return super().read_slice(name, index)


def test_a_slice_dequantises_one_expert(checkpoint: Path) -> None:
    tensors = Counted(checkpoint)
    source = Mxfp4Source(tensors)
    whole = source.read(NAME)
    tensors.experts.clear()
    for expert in range(EXPERTS):
        assert torch.equal(source.read_slice(NAME, expert), whole[expert : expert + 1])
    assert tensors.experts == [1] * (2 * EXPERTS)  # its blocks and its scales


def test_other_tensors_are_read_unchanged(checkpoint: Path) -> None:
    source = Mxfp4Source(SafetensorsSource(checkpoint))
    bias = load_file(checkpoint / FILE)[NAME + "_bias"]
    assert torch.equal(source.read(NAME + "_bias"), bias)
    assert torch.equal(source.read_slice(NAME + "_bias", 3), bias[3:4])


# --- damage --------------------------------------------------------------------------------------


def _short(tensors: dict[str, Tensor]) -> None:
    tensors[NAME + "_scales"] = tensors[NAME + "_scales"][:, :-1].contiguous()


def _wide(tensors: dict[str, Tensor]) -> None:
    tensors[NAME + "_blocks"] = tensors[NAME + "_blocks"].repeat(1, 1, 1, 2)


def _as_float(tensors: dict[str, Tensor]) -> None:
    tensors[NAME + "_scales"] = tensors[NAME + "_scales"].float()


def _no_number(tensors: dict[str, Tensor]) -> None:
    tensors[NAME + "_scales"][4, 3, 1] = 255


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(NAME + "_scales"), "gate_up_proj_scales is missing"),
        (lambda tensors: tensors.pop(NAME + "_blocks"), "no tensor for .*gate_up_proj"),
        (_short, "gate_up_proj_scales has shape"),
        (_wide, "gate_up_proj_scales has shape"),
        (_as_float, "not stored as bytes"),
        (_no_number, r"layers\.1\.mlp\.experts\.gate_up_proj, expert 4 has values that are not"),
    ],
)
def test_damage_is_named(
    change: Callable[[dict[str, Tensor]], object], match: str, checkpoint: Path
) -> None:
    tensors = load_file(checkpoint / FILE)
    change(tensors)
    save_file(tensors, checkpoint / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=match) as caught:
        offload.load(checkpoint, device="cpu")
    assert "\n" not in str(caught.value)
