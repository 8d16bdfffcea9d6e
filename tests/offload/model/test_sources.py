"""A name leads to a folder, a pack or a hub model in the local cache, and `load` makes its pack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import offload
from offload import OffloadError, SourceError, generate
from offload.files import offload_home
from offload.model.names import find
from offload.model.sources import read_config
from offload.options import LoadOptions
from offload.pack.shelf import Origin
from offload.quant.manifest import is_pack
from offload.quant.pack import Pack

HUB_ID = "somebody/tiny-mixtral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _find(name: str) -> object:
    return find(name, LoadOptions())


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def cached(hub_cache: Path, mixtral: Path) -> Path:
    """The snapshot of `HUB_ID`, as huggingface_hub keeps it."""
    repository = hub_cache / "models--somebody--tiny-mixtral"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(mixtral, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


# --- names ---------------------------------------------------------------------------------------


def test_a_folder_with_a_config_is_a_checkpoint(mixtral: Path) -> None:
    found = find(str(mixtral), LoadOptions())
    assert (found.folder, found.is_pack, found.commit) == (mixtral, False, None)
    assert found.name == "tiny-mixtral"


def test_a_folder_with_a_manifest_is_a_pack(mixtral_pack: Path) -> None:
    found = find(str(mixtral_pack), LoadOptions())
    assert (found.folder, found.is_pack) == (mixtral_pack, True)


def test_a_folder_may_be_named_from_the_home_directory(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(mixtral.parent))
    found = find("~/tiny-mixtral", LoadOptions())
    assert found.folder == mixtral


def test_a_local_folder_is_preferred_to_the_hub(
    mixtral: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebody").mkdir()
    (tmp_path / HUB_ID).symlink_to(mixtral)
    monkeypatch.chdir(tmp_path)
    found = find(HUB_ID, LoadOptions())
    assert found.commit is None


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither config\.json nor manifest\.json"):
        _find(str(tmp_path))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(SourceError, match="is a file: name the folder"):
        _find(str(file))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "two words", "", "../x"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(SourceError):
        _find(name)


# --- the hub's cache -----------------------------------------------------------------------------


def test_a_hub_id_is_found_in_the_local_cache_offline(cached: Path) -> None:
    found = find(HUB_ID, LoadOptions())
    assert (found.name, found.folder, found.commit) == (HUB_ID, cached, COMMIT)


def test_a_revision_is_found_by_its_name(cached: Path) -> None:
    (cached.parents[1] / "refs" / "v2").write_text(COMMIT)
    found = find(HUB_ID, LoadOptions(revision="v2", local_files_only=True))
    assert found.commit == COMMIT
    with pytest.raises(SourceError, match="check the name"):
        find(HUB_ID, LoadOptions(revision="v3", local_files_only=True))


def test_a_hub_id_that_is_not_cached_is_refused_offline(hub_cache: Path) -> None:
    with pytest.raises(SourceError, match=r"nobody/nothing.* or unset HF_HUB_OFFLINE"):
        _find("nobody/nothing")


def test_the_pack_of_a_hub_model_no_longer_needs_the_models_weights(cached: Path) -> None:
    model, tokenizer = offload.load(HUB_ID, device="cpu")
    text = generate(model, tokenizer, "a", max_new_tokens=8)
    assert model.offload.pack.info.source == HUB_ID
    assert COMMIT in Origin.read(model.offload.pack.path).stamps
    model.offload.close()
    (cached / "model.safetensors").unlink()
    model, tokenizer = offload.load(HUB_ID, device="cpu", local_files_only=True)
    assert generate(model, tokenizer, "a", max_new_tokens=8) == text
    model.offload.close()


def test_a_hub_model_without_its_weights_is_refused_offline(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    with pytest.raises(OffloadError):
        offload.load(HUB_ID, device="cpu")


# --- config --------------------------------------------------------------------------------------


def test_a_config_is_read_from_checkpoint_and_pack(mixtral: Path, mixtral_pack: Path) -> None:
    for folder in (mixtral, mixtral_pack):
        assert read_config("it", folder, trust_remote_code=False).model_type == "mixtral"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", "{}", '{"model_type": null}', '{"model_type": []}', "\xff"]
)
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OffloadError):
        read_config("it", tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": None},
        {"auto_map": "remote.Config"},
        {"auto_map": {"AutoConfig": ["a", "b"]}},
        {"quantization_config": "int4", "model_type": "mixtral"},
        {"num_hidden_layers": "three", "model_type": "mixtral"},
    ],
)
def test_a_config_with_strange_values_is_refused(extra: dict[str, object], tmp_path: Path) -> None:
    data = {"model_type": "unheard_of", **extra}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(OffloadError):
        read_config("it", tmp_path, trust_remote_code=False)


# --- what load makes -----------------------------------------------------------------------------


def test_load_makes_a_pack_once_and_opens_it_afterwards(
    mixtral: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        model, tokenizer = offload.load(mixtral, device="cpu")
        path = model.offload.pack.path
        model.offload.close()
        assert isinstance(model, PreTrainedModel)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert list((home / "packs").glob("*/manifest.json")) == [path / "manifest.json"]
    captured = capsys.readouterr()
    assert captured.err.count("quantising tiny-mixtral: done") == 1
    assert captured.out == ""


def test_each_recipe_has_its_pack(mixtral: Path, tmp_path: Path) -> None:
    paths = set()
    for recipe in ({}, {"expert_bits": 8}, {"group_size": 32}, {"expert_bits": 16}):
        model, _ = offload.load(mixtral, device="cpu", pack_dir=tmp_path / "here", **recipe)
        paths.add(model.offload.pack.path)
        model.offload.close()
    assert len(paths) == 4
    assert all(path.parent == tmp_path / "here" and is_pack(path) for path in paths)


def test_changed_weights_have_another_pack(mixtral: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny-mixtral"
    shutil.copytree(mixtral, copy)
    model, _ = offload.load(copy, device="cpu")
    first = model.offload.pack.path
    model.offload.close()
    weights = load_file(copy / "model.safetensors")
    trained = {name: tensor * 1.01 for name, tensor in weights.items()}
    save_file(trained, copy / "model.safetensors", metadata={"format": "pt"})
    model, _ = offload.load(copy, device="cpu")
    assert model.offload.pack.path != first
    model.offload.close()


def test_a_pack_works_without_its_checkpoint(
    mixtral: Path, mixtral_pack: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(mixtral_pack, moved)
    texts = []
    for source in (mixtral, moved):
        model, tokenizer = offload.load(source, device="cpu")
        texts.append(generate(model, tokenizer, "abc", max_new_tokens=12))
        model.offload.close()
    assert texts[0] == texts[1]


def test_a_pack_says_what_it_was_made_from(mixtral_pack: Path) -> None:
    pack = Pack(mixtral_pack)
    assert pack.info.source == "tiny-mixtral"
    assert pack.info.bits == "experts=4g64"
    pack.close()


@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_a_model_computes_in_the_checkpoints_dtype_or_the_one_asked_for(
    mixtral_pack: Path, asked: torch.dtype | None
) -> None:
    model, _ = offload.load(mixtral_pack, device="cpu", dtype=asked)
    assert model.offload.fit.dtype == model.dtype == (asked or torch.float32)
    model.offload.close()


def test_options_are_resolved_to_numbers(mixtral_pack: Path) -> None:
    model, _ = offload.load(
        mixtral_pack, device="cpu", expert_slots="25%", policy="lru", lookahead=False, context=77
    )
    fit = model.offload.fit
    assert fit.slots == 6
    assert fit.options == LoadOptions(
        device="cpu", expert_slots="25%", policy="lru", lookahead=False, context=77
    )
    assert fit.device == torch.device("cpu")
    model.offload.close()


def test_experts_are_not_in_the_module_tree(mixtral_pack: Path) -> None:
    model, _ = offload.load(mixtral_pack, device="cpu", expert_slots=1)
    names = [name for name, _ in model.named_parameters()]
    assert names
    assert not any(".experts." in name for name in names)
    model.offload.close()


# --- where files go ------------------------------------------------------------------------------


def test_files_go_to_offload_home_else_to_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("OFFLOAD_HOME", "~/mine")
    assert offload_home() == Path("/home/me/mine")
    monkeypatch.setenv("OFFLOAD_HOME", "")
    assert offload_home() == Path("/xdg/offload")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert offload_home() == Path("/home/me/.cache/offload")
