"""Packs are opened if they are whole, and refused for every kind of damage."""

from __future__ import annotations

import copy
import faulthandler
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from offload.quant.errors import OffloadError, PackError
from offload.quant.pack import MANIFEST, VERSION, Pack, PackInfo, PackLayer, is_pack, manifest_check
from offload.quant.record import MatrixSpec, RecordLayout, plan_layout, view_record
from offload.quant.scheme import Scheme
from tests.quant.packs import CONFIG, DENSE, FORK, make_info, needs_fork, record_of, write_pack

EXPERTS = PackLayer.file_name(1)
# One of these words is in every remedy.
REMEDY = re.compile(r"delete|remove|load the model|name (another|a)|choose|free some|use ")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pack that all tests share, so none may change it."""
    path = tmp_path_factory.mktemp("packs") / "good"
    write_pack(path, make_info())
    return path


@pytest.fixture
def pack(good: Path, tmp_path: Path) -> Path:
    """A whole pack that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "pack"))


def assert_refused(path: Path, name: str | None = None) -> str:
    """Fail unless opening raises our error, which names the file or pack and says what to do."""
    with pytest.raises(PackError) as caught:
        Pack(path)
    message = str(caught.value)
    assert str(path if name is None else path / name) in message
    assert REMEDY.search(message), f"no remedy: {message}"
    return message


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def every_record_is_good(pack: Pack, info: PackInfo) -> bool:
    for layer in range(len(info.layers)):
        for expert in range(info.layers[layer].num_experts):
            pack.check_record(layer, expert)
            if not torch.equal(pack.record(layer, expert), record_of(info, layer, expert)):
                return False
    return True


# --- whole packs ---


def test_what_was_written_is_what_is_read(good: Path) -> None:
    info = make_info()
    opened = Pack(good)
    assert opened.info == info
    assert every_record_is_good(opened, info)


def test_pack_knows_its_size(good: Path) -> None:
    opened = Pack(good)
    files = [file for file in good.iterdir() if file.name != MANIFEST]
    assert opened.total_bytes == sum(file.stat().st_size for file in files)
    info = opened.info
    assert info.total_experts == 4 + 5 + 4
    assert opened.info.parameters == (4 + 4) * 8 * 16 + 5 * 8 * 32 + 8
    assert info.slot_bytes == max(layout.record_bytes for layout in info.layouts)


def test_info_survives_the_manifest() -> None:
    info = make_info()
    assert PackInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_records_are_views_whose_parts_are_aligned(good: Path) -> None:
    opened = Pack(good)
    for layer in range(3):
        record = opened.record(layer, 1)
        assert record.data_ptr() % 256 == 0
        assert view_record(record, opened.info.layout_of(layer))


def test_first_record_of_a_layer_starts_on_a_page(good: Path) -> None:
    opened = Pack(good)
    assert all(opened.record(layer, 0).data_ptr() % 4096 == 0 for layer in range(3))


def test_closing_twice_is_harmless(pack: Path) -> None:
    opened = Pack(pack)
    opened.close()
    opened.close()
    assert every_record_is_good(Pack(pack), make_info())


def read_a_view_after_close(path: Path) -> None:
    faulthandler.disable()
    opened = Pack(path)
    record = opened.record(0, 0)
    opened.close()
    assert torch.equal(record, record_of(make_info(), 0, 0))


@needs_fork
def test_view_that_outlives_its_pack_keeps_its_bytes(good: Path) -> None:
    """This runs in a process of its own, which reading unmapped memory would kill."""
    process = FORK.Process(target=read_a_view_after_close, args=(good,))
    process.start()
    process.join(30)
    assert process.exitcode == 0, f"ended by signal {-(process.exitcode or 0)}"


def test_safetensors_itself_opens_every_file(good: Path) -> None:
    info = make_info()
    for index, layer in enumerate(info.layers):
        with safe_open(good / PackLayer.file_name(index), "pt") as file:
            assert set(file.keys()) == {"records", "crc32"}
            stored = file.get_tensor("records")
            assert stored.shape == (layer.num_experts, info.layout_of(index).record_bytes)
            assert stored.dtype == torch.uint8
            assert torch.equal(stored[2], record_of(info, index, 2))
            assert file.get_tensor("crc32").shape == (layer.num_experts,)
            assert file.get_tensor("crc32").dtype == torch.int64
    with safe_open(good / DENSE, "pt") as file:
        assert torch.equal(file.get_tensor("embed.weight"), torch.arange(6.0).view(2, 3))
        assert torch.equal(file.get_tensor("norm.weight"), torch.tensor([6.0, 7.0]))


def test_other_files_in_the_folder_do_no_harm(pack: Path) -> None:
    (pack / ".DS_Store").write_bytes(b"x")
    assert every_record_is_good(Pack(pack), make_info())


def test_moved_pack_is_the_same_pack(pack: Path) -> None:
    assert Pack(pack.rename(pack.with_name("elsewhere"))).info == make_info()


# --- the manifest ---


def test_folder_without_a_manifest_is_not_a_pack(pack: Path) -> None:
    (pack / MANIFEST).unlink()
    assert not is_pack(pack)
    assert MANIFEST in assert_refused(pack)


def test_missing_folder_is_not_a_pack(tmp_path: Path) -> None:
    assert not is_pack(tmp_path / "nowhere")
    assert_refused(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"nonsense", b'{"format": "moe-off', b"\xff\xfe\x00"],
    ids=["empty", "open", "nonsense", "cut", "not text"],
)
def test_manifest_that_is_not_json_is_refused(pack: Path, text: bytes) -> None:
    (pack / MANIFEST).write_bytes(text)
    assert MANIFEST in assert_refused(pack)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"pack"', "{}", '{"format": "gguf"}'])
def test_json_that_is_not_a_manifest_is_refused(pack: Path, text: str) -> None:
    (pack / MANIFEST).write_text(text)
    assert_refused(pack, MANIFEST)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("version", [0, VERSION + 1, None, str(VERSION)])
def test_pack_of_another_version_is_refused(pack: Path, version: object) -> None:
    change_manifest(pack, lambda manifest: manifest.update(version=version))
    message = assert_refused(pack)
    assert str(version) in message
    assert f"version {VERSION}" in message


@pytest.mark.parametrize(
    "key",
    ["source", "bits", "layouts", "layers", "files", "dense", "dense_layouts", "dense_parameters"],
)
def test_manifest_without_a_part_is_refused(pack: Path, key: str) -> None:
    change_manifest(pack, lambda manifest: manifest.pop(key))
    assert_refused(pack, MANIFEST)


def test_manifest_without_layers_is_refused(pack: Path) -> None:
    change_manifest(pack, lambda manifest: manifest.update(layers=[]))
    assert_refused(pack, MANIFEST)


def test_manifest_that_forgets_an_expert_file_is_refused(pack: Path) -> None:
    change_manifest(pack, lambda manifest: manifest["files"].pop(EXPERTS))
    assert_refused(pack, MANIFEST)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "sub/x", "..", ".", "", "x/"])
def test_manifest_that_names_a_file_outside_is_refused(pack: Path, name: str) -> None:
    (pack.parent / "x").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": "0" * 64}
    change_manifest(pack, lambda manifest: manifest["files"].update({name: entry}))
    assert_refused(pack)


def test_layer_whose_layout_does_not_exist_is_refused(pack: Path) -> None:
    change_manifest(pack, lambda manifest: manifest["layers"][1].update(layout=7))
    assert_refused(pack, MANIFEST)


def lie(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its checksum to fit."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["check"]
    change(manifest)
    manifest["check"] = manifest_check(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_manifest_whose_checksum_was_made_anew_is_read(pack: Path) -> None:
    lie(pack, lambda manifest: manifest.update(source="someone/else"))
    assert Pack(pack).info.source == "someone/else"


LIES: dict[str, tuple[Any, ...]] = {
    "weight_offset": (-1, -256, 1, 256, 8192, 10**12, None),
    "scale_offset": (-1, -256, 0, 1, 8192, 10**12, None),
    "step_offset": (0, 256),
    "bias_offset": (-256, 1, 8192, 10**12, None),
    "bits": (0, 1, 3, 7, 16, -8, 8.0),
    "group_size": (0, 1, 3, 7, 64, -16, 10**9),
    "scale_bits": (0, 4, 7, 8, 32),
    "rows": (0, -64, 65, 8.0, True, 10**12),
    "columns": (0, 1, -32, 64, 32.0, 10**12),
    "dtype": ("int64", "x", None),
    "bias_dtype": ("int64", None),
}


@pytest.mark.parametrize("key", LIES)
def test_layout_that_lies_is_refused(pack: Path, key: str) -> None:
    """Its checksum is right, so kernels would trust it and read and write elsewhere."""
    original = (pack / MANIFEST).read_bytes()
    for value in LIES[key]:
        lie(pack, lambda m, v=value: m["layouts"][1]["matrices"][0].update({key: v}))  # type: ignore[misc]
        assert "damaged" in assert_refused(pack, MANIFEST), f"{key} = {value!r}"
        (pack / MANIFEST).write_bytes(original)


@pytest.mark.parametrize("size", [0, 256, 2**60, 1024.0, "1024"])
def test_layout_of_another_size_is_refused(pack: Path, size: object) -> None:
    lie(pack, lambda manifest: manifest["layouts"][0].update(record_bytes=size))
    assert_refused(pack, MANIFEST)


def test_layout_without_matrices_is_refused(pack: Path) -> None:
    lie(pack, lambda manifest: manifest["layouts"].append({"matrices": [], "record_bytes": 0}))
    assert_refused(pack, MANIFEST)


@pytest.mark.parametrize("change", [{"layout": 0.0}, {"layout": True}, {"num_experts": 0}])
def test_layer_that_lies_is_refused(pack: Path, change: dict[str, object]) -> None:
    lie(pack, lambda manifest: manifest["layers"][0].update(change))
    assert_refused(pack, MANIFEST)


WEIGHT = plan_layout((MatrixSpec("weight", 8, 16, False, torch.bfloat16),), Scheme(4, 16))


@pytest.mark.parametrize(
    ("dense", "layout"),
    [
        ([{"modules": ["a"], "file": 0}, {"modules": ["a"], "file": 0}], WEIGHT),
        ([{"modules": ["a", "a"], "file": 0}], WEIGHT),
        ([{"modules": [], "file": 0}], WEIGHT),
        ([{"modules": ["a"], "file": -1}], WEIGHT),
        ([{"modules": ["a"], "file": 0.0}], WEIGHT),
        ([{"modules": ["a"], "file": 0}], make_info().layouts[0]),
        ([{"modules": ["a"], "file": 0}], plan_layout((WEIGHT.matrices[0].spec,), Scheme(16))),
    ],
    ids=["twice", "twice in one", "none", "negative", "fraction", "name", "unquantised"],
)
def test_dense_matrix_that_lies_is_refused(
    pack: Path, dense: list[dict[str, Any]], layout: RecordLayout
) -> None:
    entries = [{**entry, "layout": 0} for entry in dense]
    more = {"dense": entries, "dense_layouts": [asdict(layout)], "dense_parameters": 10**6}
    lie(pack, lambda manifest: manifest.update(more))
    assert "damaged" in assert_refused(pack, MANIFEST)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in `value` that holds nothing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path


def test_no_value_in_a_manifest_makes_another_error_than_ours(pack: Path) -> None:
    original = json.loads((pack / MANIFEST).read_text())
    escaped = []
    for where in leaves(original):
        for junk in (None, "x", -1, 10**9, 1.5, []):
            manifest = copy.deepcopy(original)
            inner = manifest
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = junk
            (pack / MANIFEST).write_text(json.dumps(manifest))
            try:
                Pack(pack).close()
            except OffloadError:
                pass
            except Exception as error:
                escaped.append(f"{'.'.join(map(str, where))} = {junk!r}: {error!r}")
    assert not escaped


def test_flipped_bit_anywhere_in_the_manifest_is_found(pack: Path) -> None:
    """Nothing else confirms the manifest, whose offsets say where scales are."""
    file = pack / MANIFEST
    good = file.read_bytes()
    missed = []
    for at in range(0, len(good), 9):
        flip(file, at)
        try:
            Pack(pack).close()
            missed.append(good[max(0, at - 20) : at + 1])
        except OffloadError:
            pass
        except Exception as error:
            missed.append(repr(error).encode())
        file.write_bytes(good)
    assert not missed, f"{len(missed)} of {len(good) // 9} flips were not found"


# --- the other files ---


@pytest.mark.parametrize("name", [EXPERTS, DENSE, CONFIG])
def test_missing_file_is_refused(pack: Path, name: str) -> None:
    (pack / name).unlink()
    assert "missing" in assert_refused(pack, name)


@pytest.mark.parametrize("name", [EXPERTS, DENSE, CONFIG])
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_truncated_file_is_refused(pack: Path, name: str, keep: float) -> None:
    data = (pack / name).read_bytes()
    (pack / name).write_bytes(data[: int(len(data) * keep) if keep >= 0 else -1])
    assert_refused(pack, name)


@pytest.mark.parametrize("name", [EXPERTS, DENSE, CONFIG])
def test_file_with_extra_bytes_is_refused(pack: Path, name: str) -> None:
    with (pack / name).open("ab") as file:
        file.write(b"\0")
    assert_refused(pack, name)


@pytest.mark.parametrize("name", [EXPERTS, DENSE, CONFIG])
def test_folder_in_place_of_a_file_is_refused(pack: Path, name: str) -> None:
    (pack / name).unlink()
    (pack / name).mkdir()
    assert_refused(pack, name)


@pytest.mark.parametrize("name", [DENSE, CONFIG])
@pytest.mark.parametrize("at", [0, 9, -1])
def test_flipped_bit_beside_the_experts_is_found_at_open(pack: Path, name: str, at: int) -> None:
    flip(pack / name, at)
    assert "checksum" in assert_refused(pack, name)


@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_in_a_record_is_found_when_it_is_checked(pack: Path, bit: int) -> None:
    size = make_info().layout_of(1).record_bytes
    flip(pack / EXPERTS, 4096 + 2 * size + 100, bit)
    opened = Pack(pack)
    for expert in (0, 1, 3, 4):
        opened.check_record(1, expert)
    with pytest.raises(PackError, match="expert 2") as caught:
        opened.check_record(1, 2)
    assert str(pack / EXPERTS) in str(caught.value)
    assert REMEDY.search(str(caught.value))


def test_flipped_bit_in_a_stored_checksum_is_found_when_it_is_used(pack: Path) -> None:
    flip(pack / EXPERTS, -8)
    with pytest.raises(PackError, match=EXPERTS):
        Pack(pack).check_record(1, 4)


def test_flipped_bit_in_an_expert_files_header_is_found_or_changes_nothing(pack: Path) -> None:
    file = pack / EXPERTS
    good = file.read_bytes()
    header = good[: good.index(b"  ")]
    for at in range(0, len(header), 2):
        flip(file, at, bit=at // 2 % 8)
        problem = None
        try:
            assert every_record_is_good(Pack(pack), make_info())
        except PackError as error:
            problem = str(error)
        if problem is not None:
            assert str(file) in problem
            assert REMEDY.search(problem)
        file.write_bytes(good)


SIZE = 5 * make_info().layout_of(1).record_bytes  # of the records in `EXPERTS`


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"records": {"data_offsets": [0]}, "crc32": {"data_offsets": [SIZE, SIZE + 40]}},
        {"records": {"data_offsets": ["0", "1"]}, "crc32": {"data_offsets": [SIZE, SIZE + 40]}},
        {"records": {"data_offsets": [0.0, SIZE * 1.0]}, "crc32": {"data_offsets": [0, 40]}},
        {"records": {"data_offsets": [0, SIZE]}, "crc32": {"data_offsets": [3, 43]}},
        {"records": {"data_offsets": [0, 10**30]}, "crc32": {"data_offsets": [SIZE, SIZE + 40]}},
        {"records": {"data_offsets": [0, SIZE]}, "crc32": {"data_offsets": [-8000, -7960]}},
    ],
    ids=["list", "empty", "one", "text", "fraction", "misaligned", "huge", "negative"],
)
def test_expert_file_whose_header_says_nonsense_is_refused(pack: Path, header: object) -> None:
    file = pack / EXPERTS
    data = file.read_bytes()
    file.write_bytes(data[:8] + json.dumps(header).encode().ljust(4096 - 8) + data[4096:])
    assert_refused(pack, EXPERTS)


def test_expert_file_whose_header_has_an_odd_length_is_refused(pack: Path) -> None:
    """Integers behind such a header would not be aligned."""
    file = pack / EXPERTS
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip().ljust(size - 1)
    file.write_bytes((size - 1).to_bytes(8, "little") + header + data[8 + size - 1 :])
    assert_refused(pack, EXPERTS)


def test_expert_file_without_a_byte_is_refused_though_the_manifest_says_so(pack: Path) -> None:
    (pack / EXPERTS).write_bytes(b"")
    lie(pack, lambda manifest: manifest["files"][EXPERTS].update(bytes=0))
    assert_refused(pack, EXPERTS)


def test_expert_file_of_another_layer_is_refused(pack: Path) -> None:
    shutil.copy(pack / PackLayer.file_name(0), pack / EXPERTS)
    assert_refused(pack, EXPERTS)
