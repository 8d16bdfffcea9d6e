"""A pack is found by its weights, whatever became of the checkpoint's place and other files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

import offload
from offload.options import LoadOptions
from offload.pack import find as finding
from offload.pack.companions import follow
from offload.pack.find import find_or_make_pack
from offload.pack.fingerprint import fingerprint, former_fingerprint
from offload.pack.recipe import Recipe
from offload.pack.shelf import ORIGIN, KeptPack, kept_packs, name_of
from offload.quant.manifest import MANIFEST, manifest_check
from offload.quant.pack import Pack
from tests.gguf_files import write_gguf
from tests.tiny import save_tiny


@pytest.fixture
def checkpoint(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "checkpoint"))


def found(source: Path | str, **options: object) -> Path:
    return find_or_make_pack(str(source), LoadOptions(**options))  # type: ignore[arg-type]


def made_anew(home: Path) -> list[str]:
    return [pack.path.name for pack in kept_packs(home / "packs")]


def _touch(folder: Path) -> Path:
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    return folder


def _newline(folder: Path) -> Path:
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    return folder


def _readme(folder: Path) -> Path:
    (folder / "README.md").write_text("license: other")
    return folder


def _rope(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        _touch,
        _newline,
        _readme,
        _rope,
        lambda folder: folder.rename(folder.with_name("moved")),
        lambda folder: Path(shutil.copytree(folder, folder.with_name("copied"))),
    ],
)
def test_the_same_weights_are_never_quantised_again(
    change: Callable[[Path], Path], checkpoint: Path, home: Path
) -> None:
    first = found(checkpoint)
    changed = change(checkpoint)
    assert found(changed) == first
    assert found(changed) == first
    assert made_anew(home) == ["checkpoint-e4"]


def test_a_pack_of_todays_fingerprint_is_found_and_keeps_being_found(
    checkpoint: Path, home: Path
) -> None:
    pack = found(checkpoint)
    old = pack.rename(pack.with_name("checkpoint-e4g64-v2-0123456789ab"))
    (old / ORIGIN).unlink()
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["check"]
    manifest["fingerprint"] = former_fingerprint(checkpoint)
    manifest["check"] = manifest_check(manifest)
    (old / MANIFEST).write_text(json.dumps(manifest))
    assert found(checkpoint) == old
    assert found(_touch(checkpoint)) == old
    assert found(checkpoint, expert_bits=8) != old
    assert len(kept_packs(home / "packs")) == 2


@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.gate.weight", "model.norm.weight"]
)
def test_one_small_tensor_that_changes_makes_another_pack_with_a_name_of_its_own(
    name: str, checkpoint: Path, home: Path
) -> None:
    first = found(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    second = found(checkpoint)
    assert first.name == "checkpoint-e4"
    assert second.name.startswith("checkpoint-e4-")
    assert Pack(second).info.fingerprint != Pack(first).info.fingerprint


def test_a_config_for_other_layers_does_not_take_the_pack(checkpoint: Path) -> None:
    first = found(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    second = found(checkpoint)
    assert second != first
    assert [len(Pack(path).info.layers) for path in (first, second)] == [3, 2]


def test_a_fingerprint_is_not_read_again_while_the_checkpoint_is_untouched(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = found(checkpoint)
    monkeypatch.setattr(finding, "fingerprint", None)
    assert found(checkpoint) == first


def test_a_gguf_file_is_known_by_its_tensors(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, save_tiny("qwen3_moe", tmp_path / "tiny"))
    first = found(file)
    moved = file.rename(tmp_path / "other.gguf")
    os.utime(moved, (1, 1))
    assert found(moved) == first
    assert made_anew(home) == ["tiny-e4"]


def test_names_are_readable() -> None:
    for model, bits, name in (
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "q4", "Mixtral-8x7B-Instruct-v0.1-q4"),
        ("demo", "experts=4", "demo-e4"),
        ("a b", "experts=3g32,head=6", "a-b-e3g32-head-6"),
        ("..", "q2", "model-q2"),
    ):
        assert name_of(model, Recipe.parse(bits)) == name
    long = name_of("demo", Recipe.parse(",".join(f"layers.{n}.experts=8" for n in range(9))))
    assert len(long) < 60


# --- the files beside the weights ----------------------------------------------------------------


def test_the_files_beside_the_weights_follow_the_checkpoint(checkpoint: Path) -> None:
    pack = found(checkpoint)
    config = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    (checkpoint / "chat_template.jinja").write_text("mended")
    assert found(checkpoint) == pack
    assert json.loads((pack / "generation_config.json").read_text())["top_k"] == 7
    model, tokenizer = offload.load(checkpoint, device="cpu")
    assert tokenizer is not None
    assert tokenizer.chat_template == "mended"
    assert model.generation_config.top_k == 7
    model.offload.close()
    (checkpoint / "chat_template.jinja").unlink()
    assert found(checkpoint) == pack
    assert not (pack / "chat_template.jinja").exists()
    Pack(pack).close()


def test_a_pack_that_cannot_be_written_is_used_as_it_is(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = found(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("mended")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("offload.pack.companions.write_whole", refuse)
    assert found(checkpoint) == pack
    assert "it keeps its old chat_template.jinja" in caplog.text
    Pack(pack).close()


# --- a pack is no checkpoint ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, MixtralForCausalLM])
def test_transformers_refuses_a_pack_in_one_sentence(
    cls: type[AutoModelForCausalLM], mixtral_pack: Path
) -> None:
    with pytest.raises(ValueError, match=r"only moe-offload can read: open it with offload\.load"):
        cls.from_pretrained(mixtral_pack)


def test_config_and_tokenizer_of_a_pack_can_be_read_by_transformers(mixtral_pack: Path) -> None:
    assert AutoConfig.from_pretrained(mixtral_pack).model_type == "mixtral"
    assert AutoTokenizer.from_pretrained(mixtral_pack)("a")["input_ids"] == [ord("a")]


def test_a_pack_whose_config_is_the_checkpoints_is_still_read(
    mixtral: Path, mixtral_pack: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(mixtral_pack, tmp_path / "old"))
    config = (mixtral / "config.json").read_bytes()
    (old / "config.json").write_bytes(config)
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["check"]
    sha = hashlib.sha256(config).hexdigest()
    manifest["files"]["config.json"] = {"bytes": len(config), "sha256": sha}
    manifest["check"] = manifest_check(manifest)
    (old / MANIFEST).write_text(json.dumps(manifest))
    for _ in range(2):
        model, _ = offload.load(old, device="cpu")
        model.offload.close()
        follow(KeptPack(old, manifest), mixtral, whole=True)
    assert (old / "config.json").read_bytes() == config


def test_fingerprints_do_not_depend_on_where_or_when(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    assert fingerprint(_touch(_newline(checkpoint))) == before


def test_a_damaged_note_is_no_harm(checkpoint: Path) -> None:
    pack = found(checkpoint)
    for text in ("", "[]", "{}", '{"stamps": 7}', "\xff"):
        (pack / ORIGIN).write_text(text)
        assert found(checkpoint) == pack
        kept = KeptPack.read(pack)
        assert kept is not None
        assert kept.origin.weights == fingerprint(checkpoint)


# --- commits of the hub --------------------------------------------------------------------------

HUB_ID = "somebody/tiny"


@pytest.fixture
def hub(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a commit of `HUB_ID`, whose files are links to blobs, as in the hub's cache."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    for folder in ("refs", "blobs"):
        (repository / folder).mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def commit(letter: str) -> Path:
        snapshot = repository / "snapshots" / (letter * 40)
        snapshot.mkdir(parents=True)
        for file in mixtral.iterdir():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            if not blob.exists():
                shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
        (repository / "refs" / "main").write_text(letter * 40)
        return snapshot

    return commit


def test_a_commit_that_leaves_the_weights_alone_uses_the_pack_and_brings_its_files(
    hub: Callable[[str], Path], home: Path
) -> None:
    hub("a")
    pack = found(HUB_ID)
    template = hub("b") / "chat_template.jinja"
    template.unlink()
    template.write_text("mended")
    assert found(HUB_ID) == pack
    assert (pack / "chat_template.jinja").read_text() == "mended"
    assert made_anew(home) == ["tiny-e4"]


def test_weights_that_were_removed_are_not_fetched_for_a_new_readme(
    hub: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hub("a")
    pack = found(HUB_ID)
    sha = (old / "model.safetensors").resolve().name
    new = hub("b")
    (new / "model.safetensors").resolve().unlink()
    for folder in (old, new):
        (folder / "model.safetensors").unlink()
    small = [file.name for file in new.iterdir() if file.is_file()]
    listed = [
        SimpleNamespace(rfilename=name, size=1, lfs=None, blob_id="small") for name in small
    ] + [
        SimpleNamespace(
            rfilename="model.safetensors", size=1, lfs=SimpleNamespace(sha256=sha), blob_id=""
        )
    ]
    told = SimpleNamespace(sha="b" * 40, siblings=listed)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: told)
    monkeypatch.setattr(finding.names, "fetch_weights", lambda *_, **__: pytest.fail("fetched"))
    assert found(HUB_ID) == pack
    assert found(HUB_ID) == pack


def test_a_change_that_was_interrupted_is_made_good(checkpoint: Path) -> None:
    pack = found(checkpoint)
    (pack / "chat_template.jinja").write_text("half a chan")
    assert found(checkpoint) == pack
    Pack(pack).close()


def test_a_folder_called_demo_is_not_the_demo(checkpoint: Path) -> None:
    folder = checkpoint.rename(checkpoint.with_name("demo"))
    kept = KeptPack.read(found(folder))
    assert kept is not None
    assert kept.origin.place == str(folder)


def test_the_tokenizer_of_a_gguf_file_is_made_again_by_another_version_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, save_tiny("qwen3_moe", tmp_path / "tiny"))
    pack = found(file)
    content = (pack / "generation_config.json").read_bytes()
    (pack / "generation_config.json").write_bytes(b"{}")
    assert found(file) == pack
    assert (pack / "generation_config.json").read_bytes() == b"{}"
    monkeypatch.setattr("offload.pack.companions.__version__", "another")
    assert found(file) == pack
    assert (pack / "generation_config.json").read_bytes() == content
