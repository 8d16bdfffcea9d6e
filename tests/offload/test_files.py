"""No file is overwritten that is not ours, and a check leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cli
from offload.files import BASELINE, MARKS, TRACE, check_output, write_output
from offload.main import parse
from offload.quant.errors import OffloadError


@pytest.mark.parametrize("kind", MARKS)
def test_only_an_earlier_file_of_the_same_kind_may_be_replaced(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    check_output(file, kind)
    assert not file.exists(), "a check leaves nothing behind"
    file.touch()
    check_output(file, kind)
    for mark in (*MARKS.values(), b"keep"):
        file.write_bytes(b"x" * 5000 + mark + b"x" * 5000)
        if mark == MARKS[kind] or MARKS[kind] in mark:
            check_output(file, kind)
        else:
            with pytest.raises(
                OffloadError, match=f"was not written as a {kind}: choose another file"
            ):
                check_output(file, kind)
        assert file.read_bytes() == b"x" * 5000 + mark + b"x" * 5000


def test_links_devices_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    check_output(link, TRACE)
    assert link.is_symlink()
    assert not link.exists()
    os.mkfifo(tmp_path / "pipe")
    for wrong in (
        os.devnull,
        tmp_path / "pipe",
        tmp_path,
        tmp_path / "no" / "file",
        tmp_path / "link" / "file",
        "",
    ):
        with pytest.raises(OffloadError):
            check_output(wrong, TRACE)


def test_a_link_stays_a_link_to_the_file_that_is_written(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    write_output(link, BASELINE, b"new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize(
    "line",
    [
        "generate demo --file=~/x --output=~/x --trace=~/x --timeline=~/x",
        "bench demo --plot=~/x --trace=~/x --timeline=~/x",
        "ppl demo --file=~/x",
        "check demo --against x --prompts=~/x --baseline=~/x --save-baseline=~/x",
    ],
)
def test_a_home_folder_that_the_shell_left_alone_is_found(line: str) -> None:
    given = vars(parse(line.split()))
    for word in line.split():
        if word.endswith("=~/x"):
            name = word.removeprefix("--").removesuffix("=~/x").replace("-", "_")
            assert given[name] == Path.home() / "x"


COMMANDS = [
    ("generate", "-p", "hi", "--trace"),
    ("generate", "-p", "hi", "--timeline"),
    ("chat", "--trace"),
    ("bench", "--trace"),
    ("bench", "--timeline"),
    ("ppl", "-f", __file__, "--trace"),
    ("check", "--against", "nowhere", "--trace"),
    ("check", "--against", "nowhere", "--save-baseline"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_refuses_a_file_of_something_else_before_it_looks_for_the_model(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keep.txt"
    file.write_text("keep")
    name, *rest = command
    assert cli.main([name, "nowhere", *rest, str(file)]) == 1
    error = capsys.readouterr().err
    assert "keep.txt exists and was not" in error
    assert error.count("\n") == 1
    assert file.read_text() == "keep"
