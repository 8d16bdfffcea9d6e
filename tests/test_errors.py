"""Bad input gets one clear line that names what is wrong and what to do, and exit code 1."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli
from offload.engine.history import HOT
from offload.options import LoadOptions
from offload.quant.manifest import VERSION, is_pack, manifest_check
from tests.tiny import save_tiny

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HI = ("-p", "hi", "-n", "4")

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail as it should; its error message."""

    def run(*arguments: str | Path, at_once: bool = True) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        errors = [line for line in lines if line.startswith("offload: error: ")]
        assert errors == lines[-1:]
        if at_once:
            assert len(lines) == 1
        assert "Traceback" not in captured.err
        message = errors[0].removeprefix("offload: error: ")
        assert "a bug" not in message
        return message

    return run


@pytest.fixture
def checkpoint(mixtral: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Mixtral to be damaged."""
    shutil.copytree(mixtral, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture
def pack(mixtral_pack: Path, tmp_path: Path) -> Path:
    """A copy of its pack to be damaged."""
    shutil.copytree(mixtral_pack, tmp_path / "broken-pack")
    return tmp_path / "broken-pack"


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x55
    file.write_bytes(data)


def _change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def _shard(checkpoint: Path) -> None:
    """Split the weights into two files with an index."""
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, checkpoint / file)
        weight_map.update(dict.fromkeys(part, file))
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _packs(home: Path) -> list[Path]:
    return [manifest.parent for manifest in home.rglob("manifest.json")]


# --- no such model, or none of ours --------------------------------------------------------------


NO_PATHS = {
    "": "a name is empty",
    " ": "a name is empty",
    "~no-such-user/x": "that home folder is not known",
    "a\0b": "is not a path",
    "x" * 300: "is not a path (File name too long)",
    "x/" * 3000: "is not a path (File name too long)",
}


@pytest.mark.parametrize("name", NO_PATHS)
def test_what_is_no_path_is_told_wherever_a_path_is_asked_for(
    name: str, fails: Fails, mixtral: Path, mixtral_pack: Path
) -> None:
    assert NO_PATHS[name] in fails("generate", name, *HI)
    if name.strip():
        assert NO_PATHS[name] in fails("generate", mixtral, *HI, "--pack-dir", name)
        assert NO_PATHS[name] in fails("generate", mixtral_pack, "-f", name)
        assert NO_PATHS[name] in fails("quantize", mixtral, name)
        assert NO_PATHS[name] in fails("check", mixtral_pack, "--against", name)


def test_a_home_that_is_no_path_is_told(
    fails: Fails, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_HOME", "~no-such-user/x")
    assert "set OFFLOAD_HOME" in fails("generate", mixtral, *HI)


def test_a_model_that_is_nowhere(fails: Fails) -> None:
    message = fails("generate", "nobody/nothing", *HI)
    assert message.startswith("model 'nobody/nothing' not found: no such folder, ")
    assert "check the name" in message


def test_a_folder_that_is_not_there(fails: Fails, tmp_path: Path) -> None:
    assert "there is no folder" in fails("generate", tmp_path / "nowhere", *HI)


def test_a_folder_that_is_not_a_model(fails: Fails, tmp_path: Path) -> None:
    assert "it is not a model" in fails("generate", tmp_path, *HI)


def test_a_dense_model(fails: Fails, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "dense")
    message = fails("generate", tmp_path / "dense", *HI)
    assert message.startswith("'llama' is not a Mixture-of-Experts model")
    assert "run it with transformers" in message


DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}


@pytest.mark.parametrize(("model_type", "config"), [("llama4_text", {}), ("dbrx", DBRX)])
def test_an_architecture_outside_the_seam_is_refused_by_name(
    model_type: str, config: dict[str, Any], fails: Fails, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "other", **config)
    message = fails("generate", tmp_path / "other", *HI)
    assert message.startswith(f"'{model_type}' is not supported")
    assert "outside the experts seam" in message
    assert "run it with transformers" in message


def test_a_model_that_generates_no_text(fails: Fails, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "vit"}')
    assert "no text-generating model for 'vit'" in fails("generate", checkpoint, *HI)


def test_a_model_transformers_does_not_know(fails: Fails, checkpoint: Path) -> None:
    _change_json(checkpoint / "config.json", model_type="unheard_of")
    message = fails("generate", checkpoint, *HI)
    assert "transformers does not know 'unheard_of'" in message


@pytest.mark.parametrize("known", [False, True])
def test_remote_code_is_not_run_without_the_flag(
    known: bool, fails: Fails, checkpoint: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w').close()\nclass C: pass\n"
    (checkpoint / "remote.py").write_text(code)
    remote = {"AutoConfig": "remote.C", "AutoModelForCausalLM": "remote.C"}
    kind = "mixtral" if known else "remote_kind"
    _change_json(checkpoint / "config.json", model_type=kind, auto_map=remote)
    if known:  # transformers' own class is used
        assert cli.main(["generate", str(checkpoint), *HI]) == 0
    else:
        message = fails("generate", checkpoint, *HI)
        assert "wants to run its own code (remote.py" in message
        assert "--trust-remote-code" in message
    assert not trace.exists()


@pytest.mark.parametrize("takes", ["past_key_values", "cache"])
def test_remote_code_that_takes_no_cache_is_refused(
    takes: str, fails: Fails, checkpoint: Path
) -> None:
    code = (
        "from transformers import MixtralForCausalLM\n"
        "class C(MixtralForCausalLM):\n"
        f"    def forward(self, input_ids=None, {takes}=None, **others):\n"
        f"        return super().forward(input_ids, {takes}={takes}, **others)\n"
    )
    (checkpoint / "remote.py").write_text(code)
    _change_json(checkpoint / "config.json", auto_map={"AutoModelForCausalLM": "remote.C"})
    arguments = ["generate", str(checkpoint), *HI, "--trust-remote-code"]
    if takes == "cache":
        assert cli.main(arguments) == 0
    else:
        assert "written for an older transformers" in fails(*arguments)


def test_remote_code_of_a_tokenizer_is_not_run_without_the_flag(
    fails: Fails, checkpoint: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    (checkpoint / "remote.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass C: pass\n")
    file = checkpoint / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["remote.C", None]}
    _change_json(file, auto_map=auto_map, tokenizer_class="C")
    (checkpoint / "tokenizer.json").unlink()
    assert "--trust-remote-code" in fails("generate", checkpoint, *HI, at_once=False)
    assert not trace.exists()


# --- damaged checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_truncated_safetensors_file(left: float, fails: Fails, checkpoint: Path) -> None:
    file = checkpoint / WEIGHTS
    size = file.stat().st_size
    os.truncate(file, int(size * left) if 0 < left < 1 else int(left) % size)
    message = fails("generate", checkpoint, *HI)
    assert f"{file} is not a whole safetensors file" in message
    assert "fetch it again" in message


@pytest.mark.parametrize("at", [0, 7, 8, 30])
def test_a_corrupted_safetensors_header(at: int, fails: Fails, checkpoint: Path) -> None:
    file = checkpoint / WEIGHTS
    data = bytearray(file.read_bytes())
    data[at : at + 4] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    message = fails("generate", checkpoint, *HI)
    assert f"{file} is not a whole safetensors file" in message


def test_a_shard_that_is_missing(fails: Fails, checkpoint: Path) -> None:
    _shard(checkpoint)
    (checkpoint / "model-2.safetensors").unlink()
    message = fails("generate", checkpoint, *HI)
    assert f"{checkpoint / 'model-2.safetensors'} is missing" in message
    assert "fetch it again" in message


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/b", ""])
def test_an_index_that_names_a_file_outside_its_folder(
    name: str, fails: Fails, checkpoint: Path, mixtral: Path
) -> None:
    _shard(checkpoint)
    shutil.copy(mixtral / WEIGHTS, checkpoint.parent / "outside.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message = fails("generate", checkpoint, *HI)
    assert "names" in message
    assert "refused" in message


def test_an_index_that_names_a_pickle(fails: Fails, checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text('{"weight_map": {"lm_head.weight": "model.bin"}}')
    assert "model.bin, which is not safetensors: refused" in fails("generate", checkpoint, *HI)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_cannot_be_read(text: str, fails: Fails, checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text(text)
    message = fails("generate", checkpoint, *HI)
    assert f"{checkpoint / INDEX} " in message


def test_a_pickle_checkpoint(fails: Fails, checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    message = fails("generate", checkpoint, *HI)
    assert "pickle (.bin)" in message
    assert "convert them to safetensors" in message


@pytest.mark.parametrize("text", ["", "not json", "[1]", "\x00"])
def test_a_config_that_is_not_json(text: str, fails: Fails, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(text)
    message = fails("generate", checkpoint, *HI)
    assert f"{checkpoint / 'config.json'} cannot be read" in message
    assert "fetch it again" in message


def test_experts_whose_shapes_do_not_match_the_config(fails: Fails, checkpoint: Path) -> None:
    _change_json(checkpoint / "config.json", intermediate_size=128)
    message = fails("generate", checkpoint, *HI, at_once=False)
    assert "config.json and weights do not match" in message


def test_dense_weights_whose_shapes_do_not_match_the_config(fails: Fails, checkpoint: Path) -> None:
    _change_json(checkpoint / "config.json", vocab_size=400)
    message = fails("generate", checkpoint, *HI, at_once=False)
    assert "config.json and weights do not match" in message
    assert "embed_tokens" in message or "lm_head" in message


@pytest.mark.parametrize("experts", [4, 16])
def test_a_number_of_experts_that_does_not_match_the_config(
    experts: int, fails: Fails, checkpoint: Path
) -> None:
    _change_json(checkpoint / "config.json", num_local_experts=experts)
    message = fails("generate", checkpoint, *HI, at_once=False)
    assert "config.json and weights do not match" in message


def test_a_checkpoint_without_one_experts_tensor(fails: Fails, checkpoint: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if "layers.1" in name and "experts.5.w2" in name)]

    _change_weights(checkpoint, drop)
    message = fails("generate", checkpoint, *HI)
    assert "7 tensors" in message
    assert "incomplete, fetch it again" in message


def test_a_checkpoint_without_any_tensor_of_a_layers_experts(
    fails: Fails, checkpoint: Path
) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1" in name and "experts" in name]:
            del tensors[name]

    _change_weights(checkpoint, drop)
    assert "incomplete, fetch it again" in fails("generate", checkpoint, *HI)


@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_a_checkpoint_without_a_dense_tensor_makes_no_pack(
    command: str, fails: Fails, checkpoint: Path, home: Path
) -> None:
    _change_weights(
        checkpoint, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight")
    )
    rest = HI if command == "generate" else (home / "pack",)
    message = fails(command, checkpoint, *rest, at_once=False)
    assert "model.layers.1.self_attn.q_proj.weight" in message
    assert "fetch it again" in message
    assert _packs(home) == []


def test_a_checkpoint_that_is_already_quantised(fails: Fails, checkpoint: Path) -> None:
    quantised = {"quant_method": "awq", "bits": 4}
    _change_json(checkpoint / "config.json", quantization_config=quantised)
    message = fails("generate", checkpoint, *HI)
    assert "already quantised (awq)" in message
    assert "use the checkpoint in bfloat16, float16, float32, fp8 or mxfp4" in message


def test_a_tokenizer_that_cannot_be_read(fails: Fails, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    assert "tokenizer" in fails("generate", checkpoint, *HI, at_once=False)


# --- damaged packs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model-00001.safetensors"]
)
def test_a_pack_whose_checksum_is_wrong(name: str, fails: Fails, pack: Path) -> None:
    _flip(pack / name, -2)
    message = fails("generate", pack, *HI)
    assert f"{pack / name} does not match its checksum" in message
    assert "delete the folder" in message


def test_a_damaged_record_is_found_when_it_is_first_used(fails: Fails, pack: Path) -> None:
    file = pack / "experts-00001.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for at in range(begin + 64, len(data) - 512, 512):  # every record: one is surely used
        data[at] ^= 1
    file.write_bytes(data)
    message = fails("generate", pack, *HI)
    assert f"{file}: the bytes of expert" in message
    assert "do not match their checksum" in message


def test_a_damaged_record_that_is_never_used_does_no_harm(pack: Path, mixtral_pack: Path) -> None:
    from offload import load, stream_generate

    def run(path: Path) -> tuple[list[int], list[int]]:
        model, _ = load(path, device="cpu", lookahead=False, warm_start=False)
        tokens = [step.token for step in stream_generate(model, None, [1], max_new_tokens=2)]
        cache = model.offload.engine.cache
        unused = [e for e in range(8) if not cache.is_resident(1, e)]
        model.offload.close()
        return tokens, unused

    expected, unused = run(mixtral_pack)
    file = pack / "experts-00001.safetensors"
    data = file.read_bytes()
    record_bytes = (len(data) - 8 - int.from_bytes(data[:8], "little")) // 8 // 256 * 256
    _flip(file, 8 + int.from_bytes(data[:8], "little") + unused[0] * record_bytes)
    assert run(pack) == (expected, unused)


@pytest.mark.parametrize("version", [0, VERSION + 1, str(VERSION), None])
def test_a_pack_of_another_version(version: Any, fails: Fails, pack: Path) -> None:
    _change_json(pack / "manifest.json", version=version)
    message = fails("generate", pack, *HI)
    assert f"{pack} is a pack of version {version}, this program reads version {VERSION}" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": 7},
        {"layouts": [{}]},
        {"files": {}},
        {"files": {"config.json": {}}},
        {"files": []},
        {"format": "something else"},
        {"dense_parameters": "x"},
    ],
)
def test_a_damaged_manifest(changes: dict[str, Any], fails: Fails, pack: Path) -> None:
    _change_json(pack / "manifest.json", **changes)
    assert f"{pack / 'manifest.json'} " in fails("generate", pack, *HI)


@pytest.mark.parametrize("text", ["", "{", "7", "[]"])
def test_a_manifest_that_is_none(text: str, fails: Fails, pack: Path) -> None:
    (pack / "manifest.json").write_text(text)
    assert str(pack) in fails("generate", pack, *HI)


@pytest.mark.parametrize("rule", ["layers.99.experts=8", "layers.2-3.attention=4"])
def test_bits_of_a_layer_that_does_not_exist(
    rule: str, fails: Fails, mixtral: Path, tmp_path: Path
) -> None:
    message = fails("quantize", mixtral, tmp_path / "new", "--bits", rule)
    assert message.startswith(rule.partition("=")[0])
    assert "has layers 0 to 2" in message


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="has no file without an end")
@pytest.mark.parametrize(
    "flags",
    [
        ("ppl", "-f"),
        ("check", "--against", "nowhere", "--prompts"),
        ("check", "--against", "nowhere", "--baseline"),
    ],
)
def test_a_text_without_an_end(flags: tuple[str, ...], fails: Fails, mixtral_pack: Path) -> None:
    command, *rest = [str(mixtral_pack) if word == "nowhere" else word for word in flags]
    assert "more than" in fails(command, mixtral_pack, *rest, "/dev/zero")


@pytest.fixture(scope="module")
def whole_pack(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose dense part is quantised too. Copy it before changing it."""
    from offload.pack.find import find_or_make_pack

    destination = tmp_path_factory.mktemp("packs") / "whole"
    return find_or_make_pack(str(mixtral), LoadOptions(bits="q4"), destination=destination)


def _transpose(matrix: dict[str, Any]) -> None:
    """As many bytes in another shape: what the layout says of itself holds."""
    matrix.update(rows=matrix["columns"], columns=matrix["rows"])


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "made for other experts": lambda m: _transpose(m["layouts"][0]["matrices"][0]),
    "made for other experts modules": lambda m: m["layouts"][0]["matrices"][0].update(name="up"),
    "matrix of another shape": lambda m: _transpose(m["dense_layouts"][-1]["matrices"][0]),
    "where the model has none": lambda m: m["dense"][0].update(modules=["model.q_proj"]),
    "where the model has none: ": lambda m: m["dense"][0].update(modules=["model.norm"]),
}


@pytest.mark.parametrize("what", LIES)
def test_a_pack_that_is_not_of_its_model(
    what: str, fails: Fails, whole_pack: Path, tmp_path: Path
) -> None:
    """Its bytes are as they were written; the kernels would compute with the wrong ones."""
    pack = Path(shutil.copytree(whole_pack, tmp_path / "lying"))
    manifest = json.loads((pack / "manifest.json").read_text())
    del manifest["check"]
    LIES[what](manifest)
    manifest["check"] = manifest_check(manifest)
    (pack / "manifest.json").write_text(json.dumps(manifest))
    assert what in fails("generate", pack, *HI)


def test_a_manifest_that_names_a_file_outside(fails: Fails, pack: Path) -> None:
    files = json.loads((pack / "manifest.json").read_text())["files"]
    entry = {"bytes": 1, "sha256": ""}
    _change_json(pack / "manifest.json", files={**files, "../outside": entry})
    forged = json.loads((pack / "manifest.json").read_text())
    del forged["check"]
    _change_json(pack / "manifest.json", check=manifest_check(forged))
    assert "names a file outside the pack (../outside)" in fails("generate", pack, *HI)


@pytest.mark.parametrize("name", ["config.json", "experts-00002.safetensors"])
def test_a_pack_that_lacks_a_file(name: str, fails: Fails, pack: Path) -> None:
    (pack / name).unlink()
    assert f"{pack / name} is missing" in fails("generate", pack, *HI)


def test_a_pack_with_a_truncated_file(fails: Fails, pack: Path) -> None:
    file = pack / "experts-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert f"{file} has" in fails("generate", pack, *HI)


# --- the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_kib", [8, 120, 420])
def test_a_disk_that_fills_up_leaves_nothing_that_is_taken_for_a_pack(
    free_kib: int, fails: Fails, small_disk: Path, mixtral: Path, mixtral_pack: Path
) -> None:
    filler, target = small_disk / "filler", small_disk / "pack"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass
    os.truncate(filler, filler.stat().st_size - free_kib * 1024)
    message = fails("quantize", mixtral, target, at_once=False)
    assert "free some space" in message
    assert _packs(small_disk) == []
    assert str(target) in fails("generate", target, *HI)
    fails("generate", small_disk / "pack.partial", *HI)
    filler.unlink()
    assert cli.main(["quantize", str(mixtral), str(target)]) == 0
    _assert_same_files(target, mixtral_pack)


@pytest.mark.parametrize("writes", [0, 1, 3, 5, 9])
def test_a_write_that_finds_the_disk_full_is_made_good_by_the_next_run(
    writes: int,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
    mixtral: Path,
    mixtral_pack: Path,
    tmp_path: Path,
) -> None:
    real, done = os.fsync, []

    def full(descriptor: int) -> None:
        if len(done) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(descriptor)
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = fails("quantize", mixtral, tmp_path / "pack", at_once=False)
    assert "the disk is full" in message
    assert "again, which continues where it stopped" in message
    assert _packs(tmp_path) == []
    assert cli.main(["quantize", str(mixtral), str(tmp_path / "pack")]) == 0
    _assert_same_files(tmp_path / "pack", mixtral_pack)


def _assert_same_files(one: Path, other: Path) -> None:
    assert is_pack(one)
    names, found = (
        sorted(file.name for file in pack.iterdir() if file.name != HOT) for pack in (other, one)
    )
    assert found == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_home_that_cannot_be_written(
    fails: Fails, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLOAD_HOME", str(tmp_path / "file"))
    assert f"cannot write {tmp_path / 'file'}" in fails("generate", mixtral, *HI)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_quantising_over_something_else_is_refused_before_any_work(
    what: str, fails: Fails, mixtral: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    if what == "folder":
        target.mkdir()
        (target / "precious").touch()
    else:
        target.write_text("precious")
    message = fails("quantize", mixtral, target)
    assert str(target) in message
    assert (target / "precious").exists() if what == "folder" else target.read_text() == "precious"


@pytest.mark.parametrize("target", ["", ".", "..", "/"])
def test_a_destination_that_names_no_folder_is_refused_before_any_work(
    target: str, fails: Fails, mixtral: Path
) -> None:
    assert "give the name of a new folder" in fails("quantize", mixtral, target)


def test_advice_for_quantize_names_what_it_has(fails: Fails, mixtral: Path) -> None:
    assert "for quantize, another DST" in fails("quantize", mixtral, "/proc/pack")


def test_a_pack_dir_where_no_lock_can_be_made_does_not_hang(fails: Fails, mixtral: Path) -> None:
    assert "cannot write /proc/" in fails("generate", mixtral, *HI, "--pack-dir", "/proc")


@pytest.mark.parametrize("name", ["n" * 255, "ש" * 127])
def test_a_source_with_a_very_long_name_gets_a_pack(
    name: str, mixtral: Path, tmp_path: Path
) -> None:
    source = tmp_path / name
    shutil.copytree(mixtral, source)
    assert cli.main(["generate", str(source), *HI]) == 0


def test_quantising_a_pack_does_not_pretend_to_have_made_another(
    fails: Fails, mixtral_pack: Path, tmp_path: Path
) -> None:
    message = fails("quantize", mixtral_pack, tmp_path / "new")
    assert "pack" in message


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--ram", "1MiB", "--ram"),
        ("--ram", "plenty", "'plenty' is not a size: write bytes or a size like 20GiB"),
        ("--vram", "20XB", "'20XB' is not a size"),
        ("--ram", "99999GiB", "--ram 99999GiB is more than the"),
        ("--expert-slots", "500%", "500% is more than all experts: write at most 100%"),
        ("-c", "513", "a context of 513 tokens is more than the model's 512 positions"),
        ("--ram", "9" * 400, "more than any machine has"),
        ("--ram", "9" * 5000, "more than any machine has"),
        ("--ram", "-1", "'-1' is not a size"),
        ("--expert-slots", "0", "at least one is needed"),
        ("--expert-slots", "-3", "'-3' is not a number of expert slots"),
        ("--expert-slots", "many", "a number or a share like 25%"),
        ("--expert-bits", "7", "experts=7: bits must be 2, 3, 4, 5, 6, 8 or 16, not 7"),
        ("--dense-bits", "1", "dense=1: bits must be 2, 3, 4, 5, 6, 8 or 16, not 1"),
        ("--bits", "q7", "'q7' is not a rule for bits: write a preset (q8, q6, q5, q4,"),
        ("--bits", "layers.3-1.experts=4", "layers.3-1 has no layers"),
        ("--group-size", "48", "group size must be 16, 32, 64, 128 or 256, not 48"),
        ("--policy", "mru", "there is no policy 'mru': choose lfru or lru"),
        ("--device", "toaster", "toaster"),
        ("--device", "cuda:99", "cuda:99"),
        ("--gpus", "0,x", "'0,x' is not a list of GPUs: write their numbers like 0,1"),
        ("--gpus", "98,99", "device 'cuda:98' is not supported here: use cpu"),
        ("--temp", "-1", "temperature is -1.0: it must be 0 or more"),
        ("--temp", "nan", "temperature is nan"),
        ("--temp", "1e999", "temperature is inf"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--top-k", "-1", "top_k is -1"),
        ("--min-p", "2", "min_p is 2.0"),
        ("--repeat-penalty", "0", "repetition_penalty is 0.0"),
        ("-n", "0", "--n-predict is 0"),
    ],
)
def test_a_bad_value_is_named_before_any_work(
    flag: str, value: str, named: str, fails: Fails, mixtral: Path, home: Path
) -> None:
    """Quantising a large model takes long: what can be known first is told first."""
    assert named in fails("generate", mixtral, "-p", "hi", flag, value, at_once=False)
    assert _packs(home) == []


def test_a_context_that_no_machine_holds_is_named_before_any_work(
    fails: Fails, gpt_oss: Path, home: Path
) -> None:
    many = str(2**31 - 1)
    message = fails("generate", gpt_oss, "-p", "hi", "--ctx-size", many, at_once=False)
    assert "lower --ctx-size" in message
    assert _packs(home) == []


def test_too_little_memory_names_the_shortage_and_the_flags(
    fails: Fails, mixtral_pack: Path
) -> None:
    message = fails("generate", mixtral_pack, *HI, "--ram", "1MiB")
    assert message.startswith("not enough memory: ")
    assert "1.0 MiB allowed" in message
    for flag in ("--ctx-size", "--expert-bits", "--ram"):
        assert flag in message


def test_more_slots_than_fit(fails: Fails, mixtral_pack: Path) -> None:
    limits = ("-c", "64", "--ram", "200.7MiB", "--expert-slots", "100%")
    message = fails("generate", mixtral_pack, *HI, *limits)
    assert re.search(r"24 .*, of which [1-9]\d* fit", message)


def test_a_prompt_longer_than_the_context(fails: Fails, mixtral_pack: Path) -> None:
    message = fails("generate", mixtral_pack, "-p", "x" * 80, "-c", "64", "--raw")
    assert "the prompt has 80 tokens and the context holds 64" in message
    assert "--ctx-size" in message


def test_a_bench_longer_than_the_context(fails: Fails, mixtral_pack: Path) -> None:
    assert "--ctx-size" in fails("bench", mixtral_pack, "-c", "64")


def test_a_bench_of_nothing(fails: Fails, mixtral_pack: Path) -> None:
    assert "nothing to measure" in fails("bench", mixtral_pack, "-p", "0", "-n", "0")


def test_no_prompt(fails: Fails, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        for arguments in ((), ("-p", "")):
            message = fails("generate", mixtral_pack, *arguments)
            assert message == "there is no prompt: give one with -p, -f or a pipe"


def test_a_pipe_that_is_no_text(
    fails: Fails, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "UTF-8" in fails("generate", mixtral_pack)


def test_a_prompt_file_that_is_not_there(fails: Fails, mixtral_pack: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    assert f"cannot read the prompt from {file}" in fails("generate", mixtral_pack, "-f", file)
    file.write_bytes(b"\xff\xfe")
    assert f"the prompt in {file} is not UTF-8 text" in fails("generate", mixtral_pack, "-f", file)


def test_a_single_turn_without_prompt(
    fails: Fails, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "--single-turn needs a prompt" in fails("chat", mixtral_pack, "--single-turn")


def test_a_chat_without_chat_template(fails: Fails, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    message = fails("chat", checkpoint, at_once=False)
    assert "no chat template" in message
    assert "offload generate --raw" in message


# --- how errors look -----------------------------------------------------------------------------


def test_debug_shows_where(mixtral_pack: Path) -> None:
    from offload import BudgetError

    with pytest.raises(BudgetError, match="is not a size"):
        cli.main(["generate", str(mixtral_pack), *HI, "--ram", "x", "--debug"])


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mixtral_pack: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("offload.loading.load_with", broken)
    assert cli.main(["generate", str(mixtral_pack), *HI]) == 1
    expected = "offload: error: RuntimeError: first line second line (a bug: --debug shows where)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["nonsense"],
        ["--nonsense"],
        ["generate", "demo", "--nonsense"],
        ["generate", "demo", "--seed", "x"],
        ["generate", "demo", "--temp", "warm"],
        ["generate", "demo", "-c", "-1"],
        ["generate", "demo", "--threads", "0"],
        ["generate", "demo", "--threads=--"],
        ["generate", "demo", "-c--"],
        ["generate", "demo", "--threads", "2147483648"],
        ["generate", "demo", "--threads", "100000"],
        ["generate", "demo", "-c", "9" * 400],
        ["generate", "demo", "-c", "9" * 5000],
        ["generate", "demo", "--seed", "9" * 5000],
        ["bench", "demo", "-pg", "a,b"],
        ["generate", "demo", "--expert-bits", "four"],
        ["bench", "demo", "-r", "0"],
        ["bench", "demo", "-p", "-1"],
        ["bench", "demo", "-pg", "5"],
        ["bench", "demo", "-o", "xml"],
        ["quantize", "demo"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("offload: error: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 1200
    assert "--help" in captured.err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: offload" in captured.err
