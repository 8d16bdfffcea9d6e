"""`offload plan`: the arithmetic of `load`, for machines that are here or named."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
import offload
from offload.budget.budget import Memory
from offload.budget.resolve import Place, Resolver
from offload.cache.trace.file import write
from offload.cache.trace.synthetic import Routing, Shape, synthesize
from offload.engine.handle import offload_of
from offload.fit import Card
from offload.machine import memory
from offload.machine.measure import DiskRate
from offload.machine.memory import Ram
from offload.model import demo
from offload.model.known import BY_NAME
from offload.options import LoadOptions
from offload.pack.recipe import Recipe
from offload.plan import outline, survey, target
from offload.units import SHARE
from tests.gguf_files import write_gguf
from tests.hub import stand_in
from tests.published import PUBLISHED
from tests.tiny import EXPERTS, LAYERS, save_tiny

MIXTRAL = PUBLISHED["Mixtral-8x7B"]
GIB = 2**30


@pytest.fixture
def mixtral_config(tmp_path: Path) -> Path:
    """A folder with the config of Mixtral-8x7B and nothing else."""
    MIXTRAL.config().save_pretrained(tmp_path / "Mixtral-8x7B")
    return tmp_path / "Mixtral-8x7B"


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of a CPU, without the second that measuring takes."""
    from offload.machine.hardware import Hardware

    rates = Hardware("this machine", 20.0, 10.0, 10.0, runs_ahead=False)
    monkeypatch.setattr(
        target, "measure", lambda device: replace(rates, runs_ahead=device.type != "cpu")
    )
    monkeypatch.setattr(memory, "ram", lambda: Ram(2**40, 2**40))
    monkeypatch.setattr(target, "read_rate", lambda folder, size: DiskRate(3.0, "by a test"))


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main(["plan", *map(str, arguments), "-o", "json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["plan", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_there_is_a_row_for_each_number_of_bits(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, mixtral_config, "--gpu", "RTX 4090", "--ram", "64GiB")
    assert [row["bits"] for row in plan["rows"]] == ["8g64", "6g64", "5g64", "4g64", "3g64", "2g64"]
    slots = [row["slots"] for row in plan["rows"]]
    assert slots == sorted(slots)
    speeds = [row["tokens_per_s"] for row in plan["rows"]]
    assert [s["usual"] for s in speeds] == sorted(s["usual"] for s in speeds)
    assert plan["parameters"] == MIXTRAL.weights
    assert plan["rows"][plan["chosen"]]["bits"] == "4g64"
    assert plan["command"] == f"offload chat {mixtral_config} --expert-bits 4 -c 4096"


def test_a_plan_has_the_slots_and_sizes_of_a_loaded_model(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ram, context = 2**28, 300
    plan = planned(capsys, mixtral, "--device", "cpu", "--ram", ram, "-c", context)
    row = next(row for row in plan["rows"] if row["bits"] == "4g64")
    model, _ = offload.load(mixtral, device="cpu", ram=ram, context=context, pack_dir=tmp_path)
    handle = offload_of(model)
    assert row["slots"] == handle.fit.slots
    assert row["expert_bytes"] == handle.pack.info.expert_bytes
    assert row["dense_bytes"] == handle.pack.info.dense_bytes(handle.fit.dtype.itemsize)
    handle.close()


@pytest.mark.parametrize("spare", [0, 1, 3 * EXPERTS - 1])
def test_slots_are_counted_as_load_counts_them(
    spare: int, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = planned(capsys, mixtral, "--expert-bits", 4, "-c", 64)["rows"][0]
    rows = planned(capsys, mixtral, "-c", 64)["rows"]
    row = next(row for row in rows if row["bits"] == "4g64")
    parts = ("dense_bytes", "kv_cache_bytes", "workspace_bytes")
    ram = sum(row[part] for part in parts) + (spare + 1) * row["slot_bytes"]
    rows = planned(capsys, mixtral, "-c", 64, "--ram", ram)["rows"]
    assert next(row for row in rows if row["bits"] == "4g64")["slots"] == spare + 1
    model, _ = offload.load(mixtral, device="cpu", ram=ram, context=64, pack_dir=tmp_path)
    assert offload_of(model).fit.slots == spare + 1
    offload_of(model).close()


def test_a_cpu_reads_every_miss_from_the_disk_if_ram_holds_slots_alone(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [mixtral_config, "--device", "cpu", "--expert-bits", 4, "-c", 64]
    everything = planned(capsys, *arguments, "--ram", "64GiB")
    row = everything["rows"][everything["chosen"]]
    parts = ("dense_bytes", "kv_cache_bytes", "workspace_bytes")
    ram = sum(row[part] for part in parts) + 230 * row["slot_bytes"]  # of 256
    plan = planned(capsys, *arguments, "--ram", ram)
    row = plan["rows"][plan["chosen"]]
    assert row["slots"] == 230
    assert (row["rest_in"], row["disk_share"]) == ("disk", 1.0), "the whole 10% without a slot"
    assert any(note.startswith("rest in: share of expert loads") for note in plan["notes"])


def test_a_card_loads_from_the_disk_the_share_that_ram_lacks(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [mixtral_config, "--gpu", "4090", "--expert-bits", 4]
    much = planned(capsys, *arguments, "--ram", "64GiB")
    half = much["rows"][much["chosen"]]["expert_bytes"] / 2
    plan = planned(capsys, *arguments, "--ram", int(half / 0.9))
    row = plan["rows"][plan["chosen"]]
    assert row["slots"] > 256 / 2
    assert row["disk_share"] == pytest.approx(0.5, abs=0.01)
    assert row["engine"] == "host"


def test_the_forecast_is_for_the_engine_that_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PUBLISHED["Qwen3-30B-A3B"].config().save_pretrained(tmp_path)
    much = planned(capsys, tmp_path, "--gpu", "4090", "--ram", "64GiB")
    assert {row["engine"] for row in much["rows"]} == {"device"}
    assert any("the GPU decides" in note for note in much["notes"])
    speeds = [row["tokens_per_s"]["usual"] for row in much["rows"]]
    assert speeds[-1] > 2 * speeds[0], "bits show"
    two = planned(capsys, tmp_path, "--gpu", "4090", "--gpus", 2, "--ram", "64GiB")
    little = planned(capsys, tmp_path, "--gpu", "4090", "--ram", "16GiB")
    assert {row["engine"] for row in two["rows"]} == {"host"}
    assert any(
        "the CPU decides what to load, with a wait" in n and "several GPUs" in n
        for n in two["notes"]
    )
    assert any("at 8g64" in n or "at 8, " in n for n in little["notes"])
    assert any("are assumed, not measured" in note for note in much["notes"])


def test_several_cards_are_planned_as_load_shares_a_model_out(
    mixtral: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ram = 2**28
    plan = planned(
        capsys, mixtral, "--gpu", "4090", "--gpus", 2, "--vram", ram, "-c", 300, "--expert-bits", 4
    )
    row = plan["rows"][plan["chosen"]]
    model = outline.outline(str(mixtral), LoadOptions(local_files_only=True))
    info = model.describe(Recipe.parse("experts=4"))
    size = int(ram * SHARE)
    cards = tuple(Card(number, torch.device("cuda", number), size) for number in range(2))
    place = Place(torch.device("cuda"), Memory(size, 0), cards)
    fit = Resolver(LoadOptions(context=300), place).fit(info, model.config, model.model)
    assert row["slots"] == fit.slots
    assert [card["slots"] for card in row["cards"]] == [s.slots for s in fit.shares]
    assert [card["dense_bytes"] for card in row["cards"]] == [s.dense for s in fit.shares]


def test_two_cards_hold_more_than_one(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = planned(capsys, mixtral_config, "--gpu", "3090", "--ram", "64GiB")
    two = planned(capsys, mixtral_config, "--gpu", "3090", "--gpus", 2, "--ram", "64GiB")
    assert two["machine"]["cards"] == 2
    assert two["machine"]["name"] == "2 x RTX 3090"
    for few, many in zip(one["rows"], two["rows"], strict=True):
        assert many["slots"] > 1.7 * few["slots"] or many["slots"] == 256
    chosen = two["rows"][two["chosen"]]
    same = next(row for row in one["rows"] if row["bits"] == chosen["bits"])
    assert chosen["slots"] == 256
    assert chosen["tokens_per_s"]["usual"] > same["tokens_per_s"]["usual"]
    assert two["command"].endswith("--gpus 0,1")


def test_a_command_for_several_cards_here_can_be_run(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    sizes = {0: 24 * GIB, 1: 12 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (sizes[device.index],) * 2)
    plan = planned(capsys, mixtral_config, "--gpus", "0,1")
    assert plan["command"].endswith("-c 4096 --gpus 0,1")
    assert plan["machine"]["card_bytes"] == [int(size * SHARE) for size in sizes.values()]
    first, second = plan["rows"][plan["chosen"]]["cards"]
    assert first["slots"] > 1.5 * second["slots"], "each card's own memory counts"


def test_the_number_of_gpus_of_a_named_machine_is_a_number_or_a_list(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = ("--ram", "64GiB", "--expert-bits", 4)
    plans = [
        planned(capsys, mixtral_config, *machine, *words)
        for words in (("--gpu", "2x3090"), ("--gpu", "3090", "--gpus", 2))
    ]
    plans.append(planned(capsys, mixtral_config, *machine, "--gpu", "3090", "--gpus", "0,1"))
    assert plans[0] == plans[1] == plans[2]
    one = planned(capsys, mixtral_config, *machine, "--gpu", "3090", "--gpus", 1)
    assert "--gpus" not in one["command"]


def test_a_card_without_a_profile_is_planned_as_the_nearest(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, mixtral_config, "--gpu", "RTX 5080 Super 24GB", "--ram", "64GiB")
    assert plan["machine"]["memory_bytes"] == int(24 * GIB * SHARE)
    assert plan["notes"][0].startswith("no GPU is known as 'RTX 5080 Super 24GB'")


def test_a_wrong_machine_is_told_before_the_hub_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "outline", lambda *_: pytest.fail("the model was looked for"))
    for words in (["--gpu", "Voodoo 2"], ["--device", "tpu"], ["--gpus", "7"]):
        told(capsys, "somebody/something", *words)


def test_the_second_kv_cache_is_mentioned_where_it_is_counted(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(mixtral_config), "--gpu", "4090", "--ram"]
    once, twice = (
        planned(capsys, mixtral_config, "--gpu", "4090", "--ram", ram)["rows"][0]
        for ram in ("16GiB", "128GiB")
    )
    assert twice["kv_cache_bytes"] == 2 * once["kv_cache_bytes"]
    for ram, told in (("16GiB", False), ("128GiB", True)):
        assert cli.main([*command, ram, "--expert-bits", "8"]) == 0
        assert ("fixed size for CUDA graphs" in capsys.readouterr().out) == told


def test_experts_that_ram_does_not_hold_come_from_the_disk(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    much = planned(capsys, mixtral_config, "--gpu", "3060", "--ram", "128GiB")
    little = planned(capsys, mixtral_config, "--gpu", "3060", "--ram", "16GiB")
    assert {row["rest_in"] for row in much["rows"]} == {"RAM"}
    assert little["rows"][0]["rest_in"] == "disk"
    assert little["rows"][0]["tokens_per_s"]["limited_by"] == "disk"
    fast, slow = (plan["rows"][0]["tokens_per_s"]["usual"] for plan in (much, little))
    assert slow < fast / 2
    assert (much["rows"][0]["disk_share"], little["rows"][0]["disk_share"] > 0.5) == (0.0, True)
    chosen = little["rows"][little["chosen"]]
    assert chosen["tokens_per_s"]["limited_by"] != "disk", "fewer bits rather than the disk"


def test_a_longer_context_leaves_room_for_fewer(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = (
        planned(capsys, mixtral_config, "--gpu", "4090", "--ram", "64G", "-c", context)["rows"][0]
        for context in (1024, 32768)
    )
    assert short["kv_cache_bytes"] * 32 == long["kv_cache_bytes"]
    assert long["slots"] < short["slots"]


def test_the_bits_that_are_asked_for_are_chosen(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, mixtral_config, "--gpu", "4090", "--bits", "experts=2g16s8,dense=4")
    assert len(plan["rows"]) == 6
    assert plan["rows"][plan["chosen"]]["bits"] == "2g16s8"
    assert "--bits experts=2g16s8,dense=4" in plan["command"]
    plain = planned(capsys, mixtral_config, "--gpu", "4090")
    assert plan["rows"][0]["dense_bytes"] < plain["rows"][0]["dense_bytes"] / 2


def test_bits_fit_chooses_the_most_bits_that_are_all_resident(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, mixtral_config, "--gpu", "4090", "--ram", "64G", "--bits", "fit")
    chosen = plan["rows"][plan["chosen"]]
    assert chosen["slots"] == 256
    assert plan["rows"][plan["chosen"] - 1]["slots"] < 256


def test_a_pack_can_only_be_run_with_its_own_bits(
    mixtral_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, mixtral_pack)
    assert plan["rows"][plan["chosen"]]["bits"] == "4g64"
    assert plan["command"] == f"offload chat {mixtral_pack} -c 512"
    assert "is a pack with experts=4g64" in told(capsys, mixtral_pack, "--expert-bits", 3)


def test_a_pack_without_weights_is_planned_all_the_same(
    mixtral_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("manifest.json", "config.json"):
        shutil.copy(mixtral_pack / name, tmp_path)
    assert planned(capsys, tmp_path)["experts"] == EXPERTS * LAYERS


def test_a_given_trace_decides_the_hits_and_must_be_of_the_model(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, experts in (("right", EXPERTS), ("wrong", EXPERTS + 1)):
        shape = Shape(name, LAYERS, experts, 2, 1, 0, 4.5)
        write(tmp_path / name, synthesize(shape, Routing(), 20))
    plan = planned(capsys, mixtral, "--trace", tmp_path / "right", "--expert-slots", "25%")
    assert "on the trace" in " ".join(plan["notes"])
    assert "the trace is of wrong" in told(capsys, mixtral, "--trace", tmp_path / "wrong")
    assert "the trace is of Mixtral" in told(capsys, mixtral, "--trace", "synthetic:mixtral")


def test_the_demo_is_planned_before_it_is_built(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, "demo", "--gpu", "4090")
    assert plan["experts"] == 240
    assert not any(home.iterdir())


@pytest.mark.demo
def test_the_demo_has_the_shapes_that_are_planned() -> None:
    checkpoint = demo.checkpoint()
    built = outline.outline(str(checkpoint), LoadOptions(local_files_only=True))
    config, expected = built.config, demo.planned_config()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        assert getattr(config, name) == getattr(expected, name)


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.beside])
def test_a_model_whose_published_weights_are_quantised_is_planned_like_any_other(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PUBLISHED[name].save_as_published(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    machine = ("--gpu", "5090", "--gpus", 4, "--ram", "768GiB")
    plan = planned(capsys, tmp_path, *machine, "--expert-bits", 4)
    assert plan["parameters"] == pytest.approx(PUBLISHED[name].weights, rel=1e-3)
    row = plan["rows"][plan["chosen"]]
    assert 4 < 8 * row["expert_bytes"] / PUBLISHED[name].weights < 4.5, "bits a weight"


def test_the_table_fits_into_80_columns(
    mixtral_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PUBLISHED["DeepSeek-V3"].config().save_pretrained(tmp_path / "v3")
    for folder, gpus in ((mixtral_config, 1), (tmp_path / "v3", 4)):
        command = ["plan", str(folder), "--gpu", "5090", "--gpus", str(gpus), "--ram", "768GiB"]
        assert cli.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        kept = [line for line in lines if not line.startswith("Run:")]
        assert max(map(len, kept)) <= 80
        assert sum(line.lstrip().startswith(">") for line in lines) == 1


def test_a_model_that_does_not_fit_is_reported_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PUBLISHED["DeepSeek-V3"].config().save_pretrained(tmp_path)
    error = told(capsys, tmp_path, "--gpu", "4090", "--ram", "512GiB")
    remedy = re.search(r"nothing fits: plan with --dense-bits (\d), which does fit", error)
    assert remedy
    bits = remedy[1]
    plan = planned(capsys, tmp_path, "--gpu", "4090", "--ram", "512GiB", "--dense-bits", bits)
    assert plan["chosen"] is not None
    assert "7.20 GiB allowed" in told(capsys, tmp_path, "--gpu", "4090", "--vram", "8GiB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "Voodoo 2"], "unknown GPU 'Voodoo 2': write a name like 4070"),
        (["--gpus", "0,1"], "device 'cuda:0' is not supported here: use cpu"),
        (["--gpu", "4090", "--gpus", "two"], "--gpus 'two' is not a list of GPUs"),
        (["--gpu", "4090", "--gpus", "65"], "at most 64"),
        (["--gpu", "4090", "--device", "cpu"], "--device names a device of this machine"),
        (["--gpu", "4090", "--ram", "x"], "is not a size"),
        (["--expert-slots", "x"], "error: 'x' is not a number of expert slots"),
        (["--expert-slots", "0"], "error: 0 expert slots: at least one is needed"),
        (["--gpu", "4090", "--ram", "64"], "'64' without a unit means bytes: write one"),
        (["--gpu", "4090", "--vram", "0"], "0.0 MiB allowed"),
        (["--trace", "/nowhere"], "/nowhere"),
        (["--bits", "q9"], "is not a rule for bits"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    arguments: list[str],
    words: str,
    mixtral_config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in told(capsys, mixtral_config, *arguments)


def test_notes_take_two_lines_unless_they_are_asked_for(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(mixtral_config), "--gpu", "4090", "--ram", "64GiB"]
    assert cli.main(command) == 0
    short = capsys.readouterr().out
    assert short.split("Run:")[1].splitlines()[2:] == [
        "- tok/s is an estimate, not a measurement: add --explain to see what it assumes"
    ]
    assert cli.main([*command, "--explain"]) == 0
    whole = " ".join(capsys.readouterr().out.split())
    for words in ("with a quarter of all experts", "low end", "the GPU decides", "assumed"):
        assert words in whole
    assert cli.main([*command[:5], "1GiB"]) == 0
    assert "- fewer than 4 bits cost much quality" in capsys.readouterr().out


def test_a_plan_with_few_bits_says_what_they_cost(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, mixtral_config, "--gpu", "4090", "--ram", "1GiB")
    assert plan["rows"][plan["chosen"]]["bits"] == "2g64"
    assert any("fewer than 4 bits cost much quality" in note for note in plan["notes"])


def test_no_speed_is_explained_where_nothing_fits(
    mixtral_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(mixtral_config), "--gpu", "4090", "-c", "10000000"]) == 1
    assert "tok/s is an estimate" not in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["llama", "dbrx", "nothing"])
def test_a_model_that_is_not_supported_is_reported_in_one_line(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert "offload: error: " in told(capsys, tmp_path)


def test_a_gguf_file_is_planned_from_its_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "m.gguf", save_tiny("mixtral", tmp_path / "checkpoint"))
    plan = planned(capsys, tmp_path / "m.gguf")
    assert plan["experts"] == EXPERTS * LAYERS


def test_only_config_and_index_of_a_hub_model_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "there"
    MIXTRAL.config().save_pretrained(folder)
    index = {"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, size in (("model-1.safetensors", 12345), ("tokenizer.json", 9), ("other.bin", 7)):
        (folder / name).write_bytes(bytes(size))
    with stand_in(tmp_path / "cache", monkeypatch) as hub:
        hub.folders["somebody/mixtral"] = folder
        plan = planned(capsys, "somebody/mixtral", "--gpu", "4090", "--ram", "64GiB")
        assert hub.fetched() == {"config.json", "model.safetensors.index.json"}
    assert plan["download_bytes"] == 12345
    assert plan["command"].startswith("offload chat somebody/mixtral ")


def test_a_hub_model_that_is_not_here_is_reported_in_one_line_when_offline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "huggingface.co is unreachable" in told(capsys, "nobody/nothing")


def test_a_checkpoint_with_its_weights_is_read_from_their_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("mixtral", tmp_path, dtype=torch.float32)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "dtype": "bfloat16"}))
    plan = planned(capsys, tmp_path, "--bits", "experts=16")
    assert plan["rows"][0]["expert_bytes"] >= 2 * plan["parameters"], "stored as float32"
    assert not any("config.json" in note for note in plan["notes"])


def test_a_known_model_is_planned_without_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "mixtral-8x7b", "--gpu", "4090", "--ram", "64GiB")
    assert plan["parameters"] == MIXTRAL.weights
    assert plan["download_bytes"] == 2 * MIXTRAL.weights
    assert plan["command"] == "offload chat mixtral-8x7b --expert-bits 4 -c 4096"
    by_id = planned(
        capsys, "mistralai/Mixtral-8x7B-Instruct-v0.1", "--gpu", "4090", "--ram", "64GiB"
    )
    assert by_id["rows"] == plan["rows"]


def test_without_a_model_there_is_a_table_of_known_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [BY_NAME[name] for name in ("olmoe", "mixtral-8x7b", "deepseek-v3")]
    monkeypatch.setattr(survey, "KNOWN", few)
    machine = ["--gpu", "4090", "--ram", "64GiB"]
    assert cli.main(["plan", *machine]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    lines = out.splitlines()
    small, middle, large = (
        next(line for line in lines if line.startswith(each.name)) for each in few
    )
    assert small.split()[1:5] == ["12.9", "GiB", "8", "7.3"]
    assert middle.split()[1:5] == ["87.0", "GiB", "4", "26.6"]
    assert "disk" in large
    assert cli.main(["plan", *machine, "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [plan["model"] for plan in told] == [each.name for each in few]
    assert told[1] == planned(capsys, "mixtral-8x7b", *machine)
