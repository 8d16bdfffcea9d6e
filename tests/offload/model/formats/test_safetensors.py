"""Safetensors checkpoints give transformers' own logits in every way of storing them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload import CheckpointError
from offload.model.formats.safetensors import DTYPES, SafetensorsSource
from offload.model.layout import INDEX, SINGLE
from tests.tiny import save_tiny

PROMPT = torch.randint(3, 120, (1, 13), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=PROMPT).logits  # type: ignore[no-any-return]


def _shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` in three files with an index; an expert's tensors are in several."""
    (folder / SINGLE).unlink(missing_ok=True)
    weight_map = {}
    for number in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_every_way_of_storing_gives_transformers_own_logits(
    model_type: str, dtype: torch.dtype, fused: bool, sharded: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    model = save_tiny(model_type, folder, dtype=dtype)
    tensors = load_file(folder / SINGLE)
    if fused:  # under the model's own names, three dimensions
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    assert any(tensor.dim() == 3 for tensor in tensors.values()) == fused
    assert any(".experts.0." in name for name in tensors) != fused
    if sharded:
        _shard(folder, tensors)
    ours, _ = offload.load(
        folder, device="cpu", expert_bits=16, dtype=torch.float32, expert_slots=3
    )
    logits = _logits(ours)
    stored = {m.dtype for layout in ours.offload.pack.info.layouts for m in layout.matrices}
    ours.offload.close()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert stored == {str(dtype).removeprefix("torch.")}
    assert (logits - _logits(theirs)).abs().max() < 1e-5


def test_tensors_and_slices_are_what_was_saved(tmp_path: Path) -> None:
    tensors = {}
    for code, dtype in DTYPES.items():
        whole = torch.arange(24).remainder(2 if dtype == torch.bool else 100).view(4, 2, 3)
        tensors[code] = whole.view(torch.int64).to(torch.float32).to(dtype)
    save_file(tensors, tmp_path / SINGLE)
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        bits = (lambda t: t.view(torch.uint8)) if tensor.element_size() == 1 else (lambda t: t)
        assert (source.shape(name), source.dtype(name)) == ((4, 2, 3), tensor.dtype)
        assert torch.equal(bits(source.read(name)), bits(tensor))
        assert torch.equal(bits(source.read_slice(name, 2)), bits(tensor[2:3]))


def test_a_dtype_that_is_not_read_is_named_when_it_is_needed(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["not.of.the.model"] = torch.ones(3, dtype=torch.int8)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    offload.load(tmp_path, device="cpu")[0].offload.close()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8, which is not"):
        offload.load(tmp_path, device="cpu")


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path)
    opened = Path.open

    def refuse(file: Path, *arguments: object, **options: object) -> object:
        if file.name == SINGLE:
            raise PermissionError(13, "Permission denied")
        return opened(file, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="may not be read by this user") as caught:
        SafetensorsSource(tmp_path)
    assert "not a whole" not in str(caught.value)
