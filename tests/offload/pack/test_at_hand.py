"""`offload list`, `show`, `rm` and `prune`: what is here, and that nothing else ever goes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

import cli
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.pack.shelf import size_of
from offload.quant.manifest import is_pack

HUB_ID = "somebody/tiny-mixtral"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the tiny Mixtral and a dense model; returns the Mixtral's snapshot."""
    cache = tmp_path / "hub"
    for name, kept in (("tiny-mixtral", True), ("dense", False)):
        repository = cache / f"models--somebody--{name}"
        snapshot = repository / "snapshots" / ("0" * 40)
        shutil.copytree(mixtral, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        if not kept:
            (snapshot / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache / "models--somebody--tiny-mixtral" / "snapshots" / ("0" * 40)


@pytest.fixture
def checkpoint(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "mine"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_


def make(source: object, **options: object) -> Path:
    return find_or_make_pack(str(source), LoadOptions(**options))  # type: ignore[arg-type]


# --- list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_list_folds_its_rows_at_a_terminal_only(
    terminal: bool, run: Run, checkpoint: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    monkeypatch.setenv("COLUMNS", "80")
    long = checkpoint.rename(checkpoint.with_name("a-model-with-a-very-long-name-" + "x" * 50))
    pack = make(long, bits="q4")
    make(HUB_ID, bits="experts=3g32,attention=5,layers.0-1.experts=8")
    code, out, _ = run("list")
    out = re.sub("\x1b[^m]*m", "", out)
    assert code == 0
    assert (max(map(len, out.splitlines())) <= 80) == terminal
    assert (f"\n{pack.name} " in out) == (not terminal)
    for word in ("NAME", "BITS", "SIZE", "LAST USED", "MADE FROM", "WHERE", "q4", "just now"):
        assert word in out
    assert HUB_ID in out
    assert "dense" not in out


def test_list_keeps_a_name_whole_where_it_can(
    run: Run, checkpoint: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    pack = make(
        checkpoint.rename(checkpoint.with_name("a-model-of-27-characters-xx")),
        bits="q4",
    )
    assert len(pack.name) == 30
    assert pack.name in run("list")[1]


def test_list_as_json_says_where_the_checkpoint_is(run: Run, checkpoint: Path, hub: Path) -> None:
    pack = make(checkpoint, bits="q4")
    found = json.loads(run("list", "-o", "json")[1])
    assert [each["name"] for each in found["checkpoints"]] == [str(checkpoint), HUB_ID]
    (told,) = found["packs"]
    assert told["path"] == str(pack)
    assert (told["name"], told["bits"]) == ("mine-q4", "q4")
    assert (told["checkpoint"], told["checkpoint_is_here"]) == (str(checkpoint), True)
    shutil.rmtree(checkpoint)
    (told,) = json.loads(run("list", "-o", "json")[1])["packs"]
    assert not told["checkpoint_is_here"]
    assert "(not here)" in run("list")[1].replace("\n", " ")


def test_a_pack_is_used_when_it_is_found(run: Run, checkpoint: Path) -> None:
    pack = make(checkpoint)
    for file in pack.iterdir():
        os.utime(file, (0, 0))
    assert "days ago" in run("list")[1]
    make("mine-e4")  # by its name
    assert "just now" in run("list")[1]


def test_list_of_nothing_says_how_to_begin(run: Run, hub: Path) -> None:
    shutil.rmtree(hub.parents[2])
    assert run("list") == (
        0,
        "",
        "No models are on this machine yet. Try: offload chat demo\n",
    )


def test_list_show_rm_and_prune_do_not_import_torch(mixtral: Path, home: Path) -> None:
    make(mixtral)
    code = (
        "import sys; from offload.main import main; name = 'tiny-mixtral-e4'\n"
        "for words in (['list'], ['show', name], ['prune', '-y'], ['rm', '-y', name]):\n"
        "    assert main(words) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- show ----------------------------------------------------------------------------------------


def test_show_tells_what_a_checkpoint_and_its_pack_are(run: Run, hub: Path) -> None:
    pack = make(HUB_ID, bits="q4")
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    told = json.loads(run("show", HUB_ID, "-o", "json")[1])
    assert (told["architecture"], told["layers"]) == ("MixtralForCausalLM", 3)
    assert (told["experts_per_layer"], told["experts_per_token"]) == (8, 2)
    assert (told["context"], told["bits"], told["license"]) == (512, "f32", "apache-2.0")
    assert told["chat_template"]
    assert told["packs"] == [pack.name]
    of_pack = json.loads(run("show", pack.name, "-o", "json")[1])
    assert of_pack["bits"]["experts"] == "4"
    assert of_pack["bits"]["attention"] == "6"
    assert of_pack["license"] == "apache-2.0"
    text = run("show", pack)[1]
    assert "experts 4, attention 6" in text
    assert "MixtralForCausalLM" in text


def test_show_counts_the_weights_as_the_model_does(run: Run, mixtral: Path, hub: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    told = json.loads(run("show", make(mixtral), "-o", "json")[1])
    assert told["parameters"] == sum(tensor.numel() for tensor in tensors.values())


# --- rm ------------------------------------------------------------------------------------------


def test_rm_says_what_it_frees_and_takes_names_and_paths(
    run: Run, checkpoint: Path, hub: Path, tmp_path: Path
) -> None:
    pack = make(checkpoint)
    elsewhere = make(checkpoint, pack_dir=tmp_path / "elsewhere")
    code, out, _ = run("rm", "-y", "mine-e4", elsewhere)
    assert code == 0
    assert out.splitlines()[-1].endswith(" freed.")
    assert not pack.exists()
    assert not elsewhere.exists()
    assert checkpoint.exists()
    assert run("rm", "-y", HUB_ID)[0] == 0
    assert not hub.exists()


def test_rm_without_a_terminal_needs_yes(run: Run, checkpoint: Path) -> None:
    pack = make(checkpoint)
    code, _, err = run("rm", "mine-e4")
    assert (code, is_pack(pack)) == (1, True)
    assert "add --yes" in err


@pytest.mark.parametrize(("answer", "stays"), [("n\n", True), ("", True), ("y\n", False)])
def test_rm_asks_on_a_terminal(
    answer: str, stays: bool, run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = make(checkpoint)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: answer, raising=False)
    assert run("rm", "mine-e4")[0] == int(stays)
    assert is_pack(pack) == stays


def test_rm_never_takes_a_users_folder_or_file(run: Run, checkpoint: Path) -> None:
    make(checkpoint)
    file = checkpoint / "config.json"
    for path in (checkpoint, file, checkpoint.parent, "/"):
        code, _, err = run("rm", "-y", path)
        assert code == 1
        assert "is not a pack" in err
    assert file.exists()


def test_rm_hints_at_the_name_that_was_meant(run: Run, checkpoint: Path) -> None:
    make(checkpoint)
    assert "did you mean mine-e4?" in run("rm", "-y", "mine-4")[2]


def test_rm_leaves_what_is_in_use(run: Run, checkpoint: Path) -> None:
    pack = make(checkpoint)
    with FileLock(pack.with_name(pack.name + ".lock")):
        assert "is being made by another process" in run("rm", "-y", pack.name)[2]
    code = "import sys, time; file = open(sys.argv[1]); print(flush=True); time.sleep(60)"
    reader = subprocess.Popen(
        [sys.executable, "-c", code, pack / "config.json"], stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    assert f"is in use by process {reader.pid}" in run("rm", "-y", pack.name)[2]
    assert is_pack(pack)
    reader.kill()
    reader.wait()
    assert run("rm", "-y", pack.name)[0] == 0


def test_rm_removes_a_link_and_not_the_pack_that_it_leads_to(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    pack = make(checkpoint)
    moved = shutil.move(pack, tmp_path / "other-disk")
    pack.symlink_to(moved)
    code, out, _ = run("rm", "-y", pack.name)
    assert (code, out.splitlines()[-1]) == (0, "0 KiB freed.")
    assert "link alone" in out
    assert is_pack(moved)
    assert not pack.is_symlink()


def test_a_folder_that_is_no_pack_is_not_what_was_meant(run: Run, home: Path) -> None:
    (home / "packs" / "letters").mkdir(parents=True)
    assert "did you mean" not in run("show", "letters")[2]


# --- prune ---------------------------------------------------------------------------------------


def test_prune_removes_what_nobody_needs_and_nothing_else(
    run: Run, checkpoint: Path, home: Path
) -> None:
    fresh, stale = make(checkpoint, bits="q4"), make(checkpoint, bits="q3")
    packs = home / "packs"
    for name in ("old.lock", "held.lock"):
        (packs / name).touch()
    (packs / "uv.lock").write_text("version = 1")
    (packs / "link.lock").symlink_to("nowhere")
    for name in ("old.partial", "held.partial"):
        (packs / name).mkdir()
        (packs / name / ".settings").write_text("{}")
    (packs / "my-own.partial").mkdir()
    (packs / "my-own.partial" / "letter.txt").write_text("Dear ...")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] += 1
    time.sleep(0.01)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    renewed = make(checkpoint, bits="q4")
    shutil.rmtree(fresh)
    with FileLock(packs / "held.lock"):
        code, out, _ = run("prune", "-y")
    assert code == 0
    assert "other weights now" in out
    left = {path.name for path in packs.iterdir()} - {"held.lock"}
    assert left == {renewed.name, "held.partial", "my-own.partial", "uv.lock", "link.lock"}
    assert not stale.exists()


def test_prune_keeps_a_pack_whose_checkpoint_is_gone(run: Run, checkpoint: Path) -> None:
    pack = make(checkpoint)
    shutil.rmtree(checkpoint)
    assert run("prune", "-y")[1] == "Nothing to remove.\n"
    assert is_pack(pack)


def test_nothing_is_left_beside_a_pack_that_was_made(checkpoint: Path, home: Path) -> None:
    pack = make(checkpoint)
    assert list((home / "packs").iterdir()) == [pack]


def test_a_file_of_the_hubs_cache_counts_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(1000))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert size_of(tmp_path) == 1000
