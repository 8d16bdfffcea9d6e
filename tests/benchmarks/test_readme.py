"""The pages show output of commands that a reader can run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks.readme import BLOCK, HUB, PAGES, output, write_cache
from offload.model.names import SHAPE_FILES, find
from offload.options import LoadOptions


def models() -> list[str]:
    """The model of every command on the pages that names one."""
    commands = [block[2] for page in PAGES for block in BLOCK.finditer(page.read_text("utf-8"))]
    words = [shlex.split(command)[1:] for command in commands]
    return [model for command, model, *_ in (w for w in words if len(w) > 1)]


def test_every_model_on_the_pages_is_one_that_a_reader_has() -> None:
    assert models()
    assert set(models()) <= {"demo", *HUB.values()}


def test_the_hub_finds_the_models_in_the_cache_that_is_made_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    write_cache(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for hub_id in HUB.values():
        found = find(hub_id, LoadOptions(local_files_only=True), SHAPE_FILES)
        assert found.name == hub_id
        assert (found.folder / "config.json").is_file()


def test_output_is_cut_where_the_command_says_so(tmp_path: Path) -> None:
    whole = output("offload doctor --help", tmp_path).splitlines()
    cut = output("offload doctor --help | head -3", tmp_path).splitlines()
    assert cut == ["```", "$ offload doctor --help | head -3", *whole[2:5], "```"]
