"""A generation_config.json that cannot be used is refused in one line, before any work."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload.errors import CheckpointError, GenerationError
from offload.model.sources import NUMBERS, WHOLE_NUMBERS, check_generation_config, end_ids
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.sampling import resolve_sampling

NESTED = "[" * 300 + "]" * 300


def _write(folder: Path, values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "generation_config.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": "hot", "do_sample": True}, "temperature is 'hot'"),
        ({"top_k": -5, "do_sample": True}, "top_k is -5"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": [1], "do_sample": True}, r"top_p is \[1\]"),
        ({"repetition_penalty": "x"}, "repetition_penalty is 'x'"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"max_new_tokens": -4}, "max_new_tokens"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is"),
        ({"eos_token_id": [["1", "x"]]}, "eos_token_id is"),
        ({"eos_token_id": "-1"}, "eos_token_id is"),
        ({"pad_token_id": [1, 2]}, r"pad_token_id is \[1, 2\]"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"__class__": "x"}, "__class__ is not a parameter"),
        ({"validate": 5}, "validate is not a parameter"),
        ({"watermarking_config": 5}, "cannot be used"),
        ({"cache_implementation": "nonsense"}, "cannot be used"),
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "an object belongs"),
        ("null", "an object belongs"),
        ('{"temperature": NaN, "do_sample": true}', "temperature is nan"),
        ('{"top_k": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"a": ' + NESTED + "}", "nested"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_file(
    values: Any, named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=named) as told:
        check_generation_config(_write(tmp_path, values))
    assert str(tmp_path / "generation_config.json") in str(told.value)
    assert "fetch it again" in str(told.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_generation_config(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": None, "top_k": None},
        {"do_sample": True, "temperature": 1, "top_p": 0.9, "top_k": 20, "min_p": 0},
        {"temperature": -1},  # it does not sample
        {"unknown": {"a": [1, [2]]}, "transformers_version": "9.9"},
    ],
)
def test_values_that_can_be_used_pass(values: dict[str, Any], tmp_path: Path) -> None:
    check_generation_config(_write(tmp_path, values))


def test_the_file_may_be_missing(tmp_path: Path) -> None:
    assert check_generation_config(tmp_path) is None


@pytest.mark.parametrize(
    ("ids", "meant"), [("2", 2), ([[2], 3], [2, 3]), (["2", 3], [2, 3]), ([], []), (7, 7)]
)
def test_end_ids_as_tools_write_them_are_read_as_meant(
    ids: Any, meant: Any, tmp_path: Path
) -> None:
    config = check_generation_config(_write(tmp_path, {"eos_token_id": ids}))
    assert config is not None
    assert config.eos_token_id == meant


def test_a_model_has_the_values_that_are_meant_and_the_log_names_them(
    mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Path(shutil.copytree(mixtral, tmp_path / "checkpoint"))
    written = {"top_k": -1, "eos_token_id": "2", "bos_token_id": [1], "pad_token_id": 0}
    _write(checkpoint, {**written, "do_sample": True})
    model, _ = offload.load(checkpoint, device="cpu", pack_dir=tmp_path / "packs")
    model.offload.close()
    config = model.generation_config
    assert resolve_sampling(config).top_k == 0
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (2, 1, 0)
    told = [record.getMessage() for record in caplog.records if record.name == "offload"]
    assert [line.partition(": ")[2] for line in told] == [
        "top_k is -1 and is read as 0",
        "eos_token_id is '2' and is read as 2",
        "bos_token_id is [1] and is read as 1",
    ]


def test_a_usual_file_is_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, {"eos_token_id": [1, 2], "pad_token_id": 0, "max_new_tokens": 9})
    assert check_generation_config(tmp_path, tell=True) is not None
    assert not caplog.records


def test_it_is_refused_before_anything_is_quantised(mixtral: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in mixtral.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    _write(checkpoint, {"temperature": "hot"})
    with pytest.raises(CheckpointError, match="'hot'"):
        find_or_make_pack(str(checkpoint), LoadOptions(pack_dir=tmp_path / "packs"))
    assert not (tmp_path / "packs").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = st.sampled_from([*NUMBERS, *WHOLE_NUMBERS, "eos_token_id", "do_sample", "num_beams"])


@given(values=st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=5))
def test_any_object_passes_or_is_refused(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = _write(tmp_path_factory.getbasetemp() / "any", values)
    with contextlib.suppress(CheckpointError):
        check_generation_config(folder)


@pytest.mark.parametrize(("value", "ids"), [(None, set()), (3, {3}), ([3, 4], {3, 4}), ([], set())])
def test_end_ids_are_none_one_or_several(value: Any, ids: set[int]) -> None:
    assert end_ids(value) == ids


@pytest.mark.parametrize("value", ["x", 1.5, [None], True, {"a": 1}])
def test_end_ids_that_are_no_whole_numbers_are_refused(value: Any) -> None:
    with pytest.raises(GenerationError, match="eos_token_id is"):
        end_ids(value)
