"""Every line of docs/coming-from.md runs as it stands, on a tiny model that is called `demo`.

Lines that need the hub or a GPU are parsed only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from cli import main
from offload.chat import commands
from offload.machine import measure
from offload.machine.hardware import Hardware
from offload.main import parse
from offload.model.demo import demo_folder
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.plan import survey

PAGE = Path(__file__).parents[1] / "docs/coming-from.md"
NEEDS = {"", "hub", "GPUs"}


@dataclass(frozen=True)
class Line:
    """What a cell of the page says in backticks."""

    text: str
    needs: str = ""
    answer: str = ""  # to a line that is refused


def lines() -> Iterator[Line]:
    """The lines of all tables, each with one in the column `here` or `you type`."""
    head: list[str] | None = None
    for row in PAGE.read_text(encoding="utf-8").splitlines():
        if not row.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if head is None:
            head = cells
        elif not set(row) <= set("| -"):
            told = dict(zip(head, cells, strict=True))
            cell = told.get("here") or told["you type"]
            found = re.fullmatch("`([^`]+)`", cell)
            assert found, f"{cell!r} is not one line in backticks"
            assert told.get("needs", "") in NEEDS
            yield Line(found[1], told.get("needs", ""), told.get("the answer", ""))


LINES = list(dict.fromkeys(lines()))
COMMANDS = [line for line in LINES if line.text.startswith("offload ")]
IN_CHAT = [line.text for line in LINES if line.text.startswith("/")]
PYTHON = [line.text for line in LINES if not line.text.startswith(("/", "offload "))]


@pytest.fixture(scope="module")
def home_with_demo(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_HOME", str(home))
        shutil.copytree(mixtral, demo_folder())
    return home


@pytest.fixture
def desk(
    home_with_demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Path:
    """A working folder with the files that lines name, and a home with the model and its pack."""
    monkeypatch.setenv("OFFLOAD_HOME", str(home_with_demo))
    monkeypatch.setenv("OFFLOAD_N_PREDICT", "8")  # the tiny model rarely ends an answer
    monkeypatch.chdir(tmp_path)
    rates = Hardware("x", memory_gb_per_s=20.0, link_gb_per_s=10.0, ram_gb_per_s=10.0)
    monkeypatch.setattr(measure, "_measure_cpu", lambda: rates)
    monkeypatch.setattr(survey, "KNOWN", survey.KNOWN[:1])
    find_or_make_pack("demo", LoadOptions())
    text = "The sky is blue because air scatters short waves. " * 4
    for name in ("notes.txt", "book.txt"):
        Path(name).write_text(text, encoding="utf-8")
    Path("prompts.jsonl").write_text("".join(json.dumps(word) + "\n" for word in ("Hi", "Ho")))
    return tmp_path


def run(text: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a line with its `< FILE` and return the exit code."""
    words, _, file = text.partition(" < ")
    with Path(file or os.devnull).open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        try:
            return main(shlex.split(words)[1:])
        except SystemExit as error:  # of --help, --version, and wrong usage
            return int(error.code or 0)


@pytest.mark.parametrize(
    "line",
    [line for line in COMMANDS if not line.needs and not line.answer],
    ids=lambda line: line.text,
)
def test_a_line_runs(
    line: Line, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--vote" in line.text:  # an answer must end, to have a vote
        monkeypatch.delenv("OFFLOAD_N_PREDICT")
    if "run.trace" in line.text:
        run('offload generate demo -p "Hi" --trace run.trace', monkeypatch)
    assert run(line.text, monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if line.needs], ids=lambda line: line.text
)
def test_a_line_for_the_hub_or_a_gpu_is_parsed(line: Line) -> None:
    assert parse(shlex.split(line.text)[1:]).command


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if line.answer], ids=lambda line: line.text
)
def test_a_line_without_a_counterpart_is_answered(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.text, monkeypatch) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line.answer in error


def test_the_lines_of_the_chat_are_understood(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: list[str] = []
    typed: list[str] = []
    obey = commands.obey

    def watched(chat: commands.Chat, line: str) -> bool:
        typed.append(line)
        try:
            return obey(chat, line)
        except Exception as error:
            refused.append(f"{line}: {error}")
            raise

    monkeypatch.setattr(commands, "obey", watched)
    Path("typed").write_text("\n".join(["Hi", *IN_CHAT, ""]), encoding="utf-8")
    assert run("offload chat demo < typed", monkeypatch) == 0
    assert typed == IN_CHAT
    assert not refused


def test_the_lines_of_python_run(desk: Path) -> None:
    names: dict[str, object] = {}
    with redirect_stdout(StringIO()):
        for line in PYTHON:
            exec(line, names)
