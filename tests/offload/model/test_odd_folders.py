"""What is nearly a checkpoint is told for what it is, with what to do, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cli
import offload
from offload import BudgetError, OffloadError
from offload.options import LoadOptions
from offload.pack import find as finding
from offload.pack.find import find_or_make_pack

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.fixture
def checkpoint(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "odd"))


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _renamed(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({rename(name): value for name, value in tensors.items()}, folder / WEIGHTS)


def _pointers(folder: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)


def _tokenizer_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)


def _mlx(folder: Path) -> None:
    quantised = {"group_size": 64, "bits": 4}
    _config(folder, quantization=quantised, quantization_config=quantised)


def _mlx_names(folder: Path) -> None:
    _renamed(folder, lambda name: name.replace(".experts.", ".switch_mlp.experts."))


def _adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")


def _lora_names(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {f"base_model.model.{name}.lora_A.weight": value for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS)


def _mistral(folder: Path) -> None:
    (folder / "config.json").rename(folder / "params.json")
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def _only_consolidated(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def _unfinished(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.safetensors.incomplete")


def _missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00002-of-00003.safetensors")


def _inner(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-500")
    (folder / "config.json").unlink()


def _diffusers(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model_index.json")


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        (_pointers, r"Git-LFS pointers .*\(model\.safetensors\)", "git lfs pull"),
        (_tokenizer_pointer, r"Git-LFS pointers .*\(tokenizer\.json\)", "git lfs pull"),
        (_mlx, "quantised to 4 bits for MLX", "use the checkpoint that it was made from"),
        (_mlx_names, "names are those of MLX", "use the checkpoint that it was made from"),
        (_adapter, r"is a LoRA adapter, not a model: merge .*\(some/base\)", "name that folder"),
        (_lora_names, "is a LoRA adapter", "merge it into its base model"),
        (_mistral, "the own format of Meta or Mistral", "safetensors checkpoint for transformers"),
        (_only_consolidated, "has consolidated.safetensors and neither", "transformers checkpoint"),
        (_unfinished, "was not downloaded to its end", "continue the download"),
        (_missing_shard, "2 of 3 files are missing", "fetch it again"),
        (_inner, "folders in it have one", "checkpoint-500"),
        (_diffusers, "a pipeline of diffusers", "safetensors checkpoint"),
        (
            lambda folder: _renamed(folder, lambda name: f"module.{name}"),
            "its names begin with 'module.'",
            "save_pretrained, or rename its tensors",
        ),
        (
            lambda folder: _renamed(folder, lambda name: f"_orig_mod.{name}"),
            "its names begin with '_orig_mod.'",
            "save_pretrained, or rename its tensors",
        ),
    ],
)
def test_an_odd_folder_is_told_for_what_it_is(
    change: Callable[[Path], None], what: str, remedy: str, checkpoint: Path, home: Path
) -> None:
    change(checkpoint)
    with pytest.raises(OffloadError, match=what) as caught:
        offload.load(checkpoint, device="cpu")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(home.glob("packs/*"))


def test_the_hubs_cache_folder_is_answered_with_the_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--somebody--tiny"
    (folder / "snapshots" / "0").mkdir(parents=True)
    with pytest.raises(OffloadError, match="name the model, somebody/tiny"):
        offload.load(folder, device="cpu")


def test_shards_without_an_index_are_a_checkpoint(checkpoint: Path) -> None:
    whole = find_or_make_pack(str(checkpoint), LoadOptions())
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    for at in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[at - 1 :: 2]}
        save_file(part, checkpoint / f"model-{at:05d}-of-00002.safetensors")
    split = find_or_make_pack(str(checkpoint), LoadOptions())
    for file in whole.glob("*.safetensors"):
        assert (split / file.name).read_bytes() == file.read_bytes()


# --- tokenizers ----------------------------------------------------------------------------------


def _only(folder: Path, name: str, content: str = "x") -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("tekken.json", "mistral-common"),
        ("tokenizer.model", "sentencepiece"),
        ("qwen.tiktoken", "tiktoken"),
    ],
)
def test_a_tokenizer_that_needs_a_package_names_it(
    name: str, package: str, checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = offload.model.tokenizer.importlib.util.find_spec
    absent = ("mistral_common", "sentencepiece", "tiktoken")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *_: None if name in absent else find(name)
    )
    _only(checkpoint, name, "{}")
    with pytest.raises(OffloadError, match=rf"pip install {package}"):
        offload.load(checkpoint, device="cpu")
    assert not list(home.glob("packs/*"))


def test_a_tokenizer_with_code_asks_for_trust(checkpoint: Path, home: Path) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    _only(checkpoint, "tokenizer_config.json", json.dumps(settings))
    with pytest.raises(OffloadError, match="if you trust it"):
        offload.load(checkpoint, device="cpu")
    assert not list(home.glob("packs/*"))


def test_files_that_a_tokenizers_code_reads_are_in_the_pack(checkpoint: Path) -> None:
    (checkpoint / "qwen.tiktoken").write_text("IQ== 0\n")
    pack = find_or_make_pack(str(checkpoint), LoadOptions())
    assert (pack / "qwen.tiktoken").read_text() == "IQ== 0\n"


# --- told before weights are quantised -----------------------------------------------------------


def test_a_broken_tokenizer_is_told_before_weights_are_quantised(
    checkpoint: Path, home: Path
) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(OffloadError, match=r"tokenizer in .* cannot be used"):
        offload.load(checkpoint, device="cpu")
    assert not list(home.glob("packs/*"))


def test_chat_without_a_template_is_told_before_torch_is_imported(
    checkpoint: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    monkeypatch.setattr("offload.pack.asked.import_transformers", lambda: pytest.fail("too late"))
    assert cli.main(["chat", str(checkpoint), "-p", "Hi"]) == 1
    assert "has no chat template: use offload generate --raw" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_room_and_memory_are_checked_before_weights_are_fetched(
    what: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--somebody--roomy"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(checkpoint, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        finding.names, "fetch_weights", lambda *_, **__: pytest.fail("weights were fetched")
    )
    if what == "disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(OffloadError, match=r"the pack needs .* free: free some space"):
            offload.load("somebody/roomy", device="cpu")
    else:
        with pytest.raises(BudgetError):
            offload.load("somebody/roomy", device="cpu", ram=1000)
