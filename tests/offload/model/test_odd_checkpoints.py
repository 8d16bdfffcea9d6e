"""Checkpoints with impossible values are refused in one line, before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli
import offload
from offload import CheckpointError, OffloadError
from offload.files import read_object
from offload.quant.manifest import is_pack

WEIGHTS = "model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def checkpoint(mixtral: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Mixtral to be damaged."""
    shutil.copytree(mixtral, tmp_path / "odd")
    return tmp_path / "odd"


def _fails(folder: Path, match: str, kind: type[OffloadError] = CheckpointError) -> str:
    with pytest.raises(kind, match=match) as caught:
        offload.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 9, 10**9, "two", 1.5, None, True, [2], {}])
@pytest.mark.parametrize(
    "name",
    [
        "num_local_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_impossible_number_in_a_config_is_refused_in_one_line(
    name: str, value: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get(name) == value or (name == "head_dim" and not value):
        return  # as it is, or the same as no value
    (checkpoint / "config.json").write_text(json.dumps({**config, name: value}))
    code = cli.main(["quantize", str(checkpoint), str(home / "out"), "--expert-bits", "16"])
    error = capsys.readouterr().err
    assert "a bug" not in error
    assert "Traceback" not in error
    if value not in (True, [2]):
        assert code == 1
        assert error.splitlines()[-1].startswith("offload: error: ")
        assert error.count("\n") == 1 or "do not match" in error
        assert not (home / "out").exists()


@pytest.mark.parametrize("chosen", [0, -1, 9, "2"])
def test_a_token_cannot_be_sent_to_more_experts_than_there_are(
    chosen: object, checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": chosen}))
    _fails(checkpoint, "num_experts_per_tok")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "[]", "7", '"text"', "null", "\xff"])
def test_json_that_is_no_object_is_refused_in_one_line(
    name: str, text: str, checkpoint: Path
) -> None:
    (checkpoint / name).write_bytes(text.encode("latin-1"))
    assert name in _fails(checkpoint, "fetch it again")


def test_a_json_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, **options: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match="may not be read by this user: change its permis"):
        read_object(tmp_path / "config.json")


def test_a_tokenizer_that_may_not_be_read_is_not_called_damaged(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Path.read_bytes

    def refuse(file: Path) -> bytes:
        if file.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied")
        return content(file)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    _fails(checkpoint, r"tokenizer\.json may not be read by this user")


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("model.layers.1.block_sparse_moe.experts.5.w3.weight", "gate_up_proj, expert 5"),
        ("model.layers.2.block_sparse_moe.experts.0.w2.weight", "down_proj, expert 0"),
        ("model.layers.0.self_attn.k_proj.weight", "self_attn.k_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_weights_that_are_nan_or_infinite_are_named(
    name: str, called: str, bits: int, value: float, checkpoint: Path, home: Path
) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    tensors[name].view(-1)[3] = value
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{called} has values that are not numbers"):
        offload.load(checkpoint, device="cpu", expert_bits=bits)
    assert list(home.rglob("manifest.json")) == []


@pytest.mark.parametrize("fused", [False, True])
def test_experts_that_are_single_numbers_are_refused(fused: bool, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    odd = [name for name in tensors if name.endswith((".w1.weight", ".w3.weight"))]
    if fused:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in odd}
        odd = [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(3)]
    tensors.update((name, torch.tensor(1.0)) for name in odd)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    _fails(checkpoint, "gate_up_proj", OffloadError)


def test_the_largest_finite_numbers_are_accepted(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    tensors["model.norm.weight"][0] = torch.finfo(torch.float32).max
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    offload.load(checkpoint, device="cpu")[0].offload.close()


# --- other programs' manifests -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{}", '{"name": "App", "icons": []}', "", "[", "\xff", DEEP])
def test_another_programs_manifest_does_not_make_a_checkpoint_a_pack(
    text: str, checkpoint: Path
) -> None:
    (checkpoint / "manifest.json").write_bytes(text.encode("latin-1"))
    assert not is_pack(checkpoint)
    offload.load(checkpoint, device="cpu")[0].offload.close()


def test_a_folder_with_only_another_programs_manifest_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert "delete" not in _fails(tmp_path, "it is not a model", OffloadError)


def test_a_pack_with_a_damaged_manifest_is_still_recognised(
    mixtral_pack: Path, tmp_path: Path
) -> None:
    shutil.copytree(mixtral_pack, tmp_path / "pack")
    (tmp_path / "pack" / "manifest.json").write_text(DEEP)
    assert is_pack(tmp_path / "pack")
    _fails(tmp_path / "pack", "delete the folder", OffloadError)
