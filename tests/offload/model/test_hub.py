"""Models on the hub: what is fetched of them, what is said when that fails, GGUF files there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

import cli
import offload
from offload import OffloadError, SourceError
from offload.model import hub
from offload.model.hub import quant_of
from offload.model.names import SHAPE_FILES, FoundModel, fetch_weights, find
from offload.options import LoadOptions
from tests.gguf_files import write_gguf
from tests.hub import COMMIT, StandIn, stand_in
from tests.tiny import save_tiny

ID = "somebody/tiny"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The hub; it has `ID`, a tiny Mixtral with more than is needed beside it."""
    with stand_in(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def tiny(server: StandIn, mixtral: Path, tmp_path: Path) -> StandIn:
    """`server` with `ID`: a checkpoint, and what is not wanted of it."""
    folder = tmp_path / "there"
    shutil.copytree(mixtral, folder)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never wanted")
    (folder / "original" / "params.json").write_text("{}")
    (folder / "README.md").write_text("# a model")
    server.folders[ID] = folder
    return server


@pytest.fixture
def ggufs(server: StandIn, tmp_path: Path) -> StandIn:
    """`server` with `ID`: two quantisations, one of them in two parts in a folder."""
    folder = tmp_path / "ggufs"
    (folder / "Q8_0").mkdir(parents=True)
    model = save_tiny("mixtral", tmp_path / "checkpoint")
    write_gguf(folder / "tiny-Q4_K_M.gguf", model)
    for number in (1, 2):
        part = folder / "Q8_0" / f"tiny-Q8_0-0000{number}-of-00002.gguf"
        write_gguf(part, model)
        part.write_bytes(part.read_bytes() + bytes(number))  # two files of other contents
    (folder / "mmproj-F16.gguf").write_bytes(b"pictures")
    (folder / "README.md").write_text("# ggufs")
    server.folders[ID] = folder
    return server


def found(name: str = ID, **options: object) -> FoundModel:
    return find(name, LoadOptions(**options))  # type: ignore[arg-type]


def refused(name: str, **options: object) -> str:
    with pytest.raises(SourceError) as caught:
        fetch_weights(found(name, **options))
    return str(caught.value)


# --- checkpoints ----------------------------------------------------------------------------------


def test_only_what_the_model_needs_is_fetched(tiny: StandIn) -> None:
    fetch_weights(found())
    small = {file.name for file in tiny.folders[ID].iterdir() if file.suffix in (".json", ".jinja")}
    assert tiny.fetched() == small | {"model.safetensors"}


def test_a_plan_needs_the_shapes_alone(tiny: StandIn) -> None:
    find(ID, LoadOptions(), SHAPE_FILES)
    assert tiny.fetched() == {"config.json"}


def test_a_model_is_loaded_from_the_hub_and_later_without_it(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, _ = offload.load(ID, device="cpu")
    model.offload.close()
    assert f"fetching {ID}: done" in capfd.readouterr().err
    tiny.asked.clear()
    model, _ = offload.load(ID, device="cpu")
    model.offload.close()
    assert tiny.fetched() == set()
    err = capfd.readouterr().err
    assert "fetching" not in err.casefold(), "nothing is said at the start of a model that is here"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.forget()
    model, _ = offload.load(ID, device="cpu")
    model.offload.close()
    assert found().commit == COMMIT


def test_an_interrupted_download_goes_on_where_it_stopped(tiny: StandIn) -> None:
    size = (tiny.folders[ID] / "model.safetensors").stat().st_size
    tiny.break_after["model.safetensors"] = [size // 3, 1000, *[0] * 10]
    message = refused(ID)
    assert "connection" in message
    assert "continues where it stopped" in message
    begun = size // 3 + 1000
    assert any(line.endswith(f" {begun}-") for line in tiny.asked)
    tiny.break_after.clear()
    tiny.asked.clear()
    fetch_weights(found())
    (first,) = [line for line in tiny.asked if "GET" in line and "safetensors" in line]
    assert first.endswith(f" {begun}-")
    here = found().folder / "model.safetensors"
    assert here.read_bytes() == (tiny.folders[ID] / "model.safetensors").read_bytes()


def test_a_short_break_is_not_an_error(tiny: StandIn) -> None:
    tiny.break_after["model.safetensors"] = [2000]
    fetch_weights(found())
    assert sum("safetensors" in line and "GET" in line for line in tiny.asked) == 2


def test_a_size_that_the_hub_does_not_give_is_found_out(tiny: StandIn) -> None:
    tiny.sizes["model.safetensors"] = 0
    fetch_weights(found())
    here = found().folder / "model.safetensors"
    assert here.read_bytes() == (tiny.folders[ID] / "model.safetensors").read_bytes()


def test_a_file_that_is_shorter_than_the_hub_says_is_not_asked_for_for_ever(tiny: StandIn) -> None:
    tiny.sizes["model.safetensors"] = (tiny.folders[ID] / "model.safetensors").stat().st_size + 9
    assert "model.safetensors of somebody/tiny came with another size" in refused(ID)
    assert sum("safetensors" in line for line in tiny.asked) < 9


@pytest.mark.parametrize(
    ("name", "status"),
    [("api", 404), ("api", 429), ("config.json", 404), ("model.safetensors", 429)],
)
def test_what_the_hub_answers_is_told(name: str, status: int, tiny: StandIn) -> None:
    tiny.status[name] = status
    message = refused(ID)
    assert str(status) in message
    assert "unreachable" not in message


def test_a_disk_without_room_is_told_before_the_first_byte(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = found()
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: free)
    with pytest.raises(SourceError, match=r"the download needs .* and .* has 0.0 MiB free"):
        fetch_weights(source)
    assert "model.safetensors" not in tiny.fetched()


def test_a_disk_that_fills_up_is_called_full(small_disk: Path, tiny: StandIn) -> None:
    huggingface_hub.constants.HF_HUB_CACHE = str(small_disk)
    source = found()
    (small_disk / "ballast").write_bytes(bytes(500_000))
    with pytest.raises(SourceError, match=r"has no room|download needs"):
        fetch_weights(source)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("somebody/tinny", "has no model 'somebody/tinny'"),
        ("qwen/Qwen3-30B-A3", "did you mean Qwen/Qwen3-30B-A3B?"),
    ],
)
def test_a_model_that_the_hub_does_not_have(server: StandIn, name: str, words: str) -> None:
    assert words in refused(name)


def test_a_gated_model_and_a_wrong_revision_are_told_apart(tiny: StandIn) -> None:
    assert "has no revision 'v7'" in refused(ID, revision="v7")
    tiny.gated.add(ID)
    hub.forget()
    message = refused(ID)
    assert "is gated: accept its terms at" in message
    assert "HF_TOKEN" in message


def test_a_hub_that_cannot_be_reached_is_told(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused("somebody/else")
    assert "127.0.0.1:9 is unreachable" in message
    assert message.endswith("check the name, or check the connection")


def test_a_repository_without_a_model_is_told(server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    server.folders[ID] = tmp_path / "empty"
    assert "has neither config.json nor GGUF files" in refused(ID)


def test_a_checkpoint_without_safetensors_is_told(tiny: StandIn) -> None:
    (tiny.folders[ID] / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(ID)


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"{ID}:Q4_K_M",
        f"{ID}:q4_k_m",
        f"{ID}/tiny-Q4_K_M.gguf",
        f"https://huggingface.co/{ID}/resolve/main/tiny-Q4_K_M.gguf?download=true",
        f"https://huggingface.co/{ID}/blob/main/tiny-Q4_K_M.gguf",
        f"hf.co/{ID}:Q4_K_M",
    ],
)
def test_one_gguf_file_is_fetched_by_any_of_its_names(ggufs: StandIn, name: str) -> None:
    source = found(name)
    assert source.folder.name == "tiny-Q4_K_M.gguf"
    assert ggufs.fetched() == {"tiny-Q4_K_M.gguf"}
    assert source.commit == COMMIT


@pytest.mark.parametrize("name", [f"{ID}:Q8_0", f"{ID}/Q8_0/tiny-Q8_0-00002-of-00002.gguf"])
def test_a_model_in_parts_comes_with_all_of_them(ggufs: StandIn, name: str) -> None:
    source = found(name)
    assert source.folder.name == "tiny-Q8_0-00001-of-00002.gguf"
    assert ggufs.fetched() == {f"Q8_0/tiny-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)}


def test_a_part_that_is_missing_there_is_told(ggufs: StandIn) -> None:
    (ggufs.folders[ID] / "Q8_0" / "tiny-Q8_0-00002-of-00002.gguf").unlink()
    assert "has 1 of the 2 parts" in refused(f"{ID}:Q8_0")


@pytest.mark.parametrize("name", [ID, f"{ID}:Q2_K", f"{ID}/other.gguf"])
def test_the_choice_is_listed_with_sizes(ggufs: StandIn, name: str) -> None:
    message = refused(name)
    assert f"{ID}:Q4_K_M (" in message
    assert f"{ID}:Q8_0 (" in message
    assert "mmproj" not in message


def test_the_only_gguf_model_needs_no_name(ggufs: StandIn) -> None:
    shutil.rmtree(ggufs.folders[ID] / "Q8_0")
    assert found(ID).folder.name == "tiny-Q4_K_M.gguf"


def test_a_gguf_model_on_the_hub_is_loaded_and_found_again_offline(
    ggufs: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = offload.load(f"{ID}:Q4_K_M", device="cpu")
    assert model.offload.pack.info.source == f"{ID}:Q4_K_M"
    model.offload.close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.forget()
    assert found(f"{ID}:Q4_K_M").folder.name == "tiny-Q4_K_M.gguf"


def test_a_gguf_model_is_planned_from_its_header(
    ggufs: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HEADER", 2**16)
    assert cli.main(["plan", f"{ID}:Q4_K_M", "--gpu", "4090", "-o", "json"]) == 0
    size = (ggufs.folders[ID] / "tiny-Q4_K_M.gguf").stat().st_size
    assert json.loads(capsys.readouterr().out)["download_bytes"] == size
    assert [line for line in ggufs.asked if "GET" in line and "gguf" in line] == [
        f"GET /{ID}/resolve/{COMMIT}/tiny-Q4_K_M.gguf 0-65535"
    ]


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("UD-IQ2_M/big-UD-IQ2_M-00001-of-00003.gguf", "UD-IQ2_M"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("mixtral-8x7b-instruct-v0.1.Q5_K_S.gguf", "Q5_K_S"),
        ("model-f16.gguf", "F16"),
        ("model.gguf", ""),
    ],
)
def test_a_quantisation_is_read_from_the_name_of_a_file(path: str, quant: str) -> None:
    assert quant_of(path) == quant


# --- what is told before weights are fetched ----------------------------------------------------


def test_a_chat_with_a_base_model_ends_before_its_weights_are_fetched(
    tiny: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny.folders[ID] / "chat_template.jinja").unlink()
    assert cli.main(["chat", ID, "-st", "-p", "hello"]) == 1
    assert f"{ID} has no chat template" in capsys.readouterr().err
    assert "model.safetensors" not in tiny.fetched()


def test_an_unreadable_tokenizer_is_told_before_weights_are_fetched(tiny: StandIn) -> None:
    (tiny.folders[ID] / "tokenizer.json").write_text("{}")
    with pytest.raises(OffloadError, match=r"the tokenizer in .* cannot be used"):
        offload.load(ID, device="cpu")
    assert "model.safetensors" not in tiny.fetched()


def test_too_little_memory_is_told_before_weights_are_fetched(tiny: StandIn) -> None:
    with pytest.raises(OffloadError, match=r"10\.0 MiB"):
        offload.load(ID, device="cpu", ram="10MiB")
    assert "model.safetensors" not in tiny.fetched()


def test_a_disk_without_room_for_the_pack_is_told_before_weights_are_fetched(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny.folders[ID] / "model.safetensors").stat().st_size
    free = shutil.disk_usage("/")._replace(free=size + 1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OffloadError, match="free some"):
        offload.load(ID, device="cpu")
    assert "model.safetensors" not in tiny.fetched()
