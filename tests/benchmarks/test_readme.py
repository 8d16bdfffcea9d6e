"""The commands whose output the pages show are commands that a reader can give."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks.readme import BLOCK, HUB, PAGES, write_cache
from offload.model.sources import SHAPE_FILES, find


def models() -> list[str]:
    """Every model that a command on the pages names."""
    commands = [block[2] for page in PAGES for block in BLOCK.finditer(page.read_text("utf-8"))]
    words = [shlex.split(command)[1:] for command in commands]
    return [model for command, model, *_ in (w for w in words if len(w) > 1)]


def test_a_model_on_the_pages_is_one_that_a_reader_has() -> None:
    assert models()
    assert set(models()) <= {"demo", *HUB.values()}


def test_the_cache_made_for_them_is_one_that_the_hub_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    write_cache(tmp_path)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: real(name, cache_dir=tmp_path, **options),
    )
    for hub_id in HUB.values():
        found = find(
            hub_id,
            revision=None,
            local_files_only=True,
            trust_remote_code=False,
            files=SHAPE_FILES,
        )
        assert found.name == hub_id
        assert (found.folder / "config.json").is_file()
