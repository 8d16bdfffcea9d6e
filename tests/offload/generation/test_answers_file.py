"""Prompts come from a file, and answers go to a file that can be continued after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cli import main
from offload.files import MOST_CHARACTERS
from offload.generation.answers import AnswersFile, read_prompt_lines
from offload.generation.conversation import conversation_of
from offload.quant.errors import OffloadError

GIVEN = [{"prompt": f"number {i}", "id": i} for i in range(6)]


def _prompts(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(given) + "\n" for given in GIVEN), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"text": "a"}', '{"prompt": 3}', '{"messages": [{}]}', "[" * 10000]
)
def test_the_error_names_a_line_that_is_not_a_prompt(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n\n{line}\n')
    with pytest.raises(OffloadError, match="line 3"):
        read_prompt_lines(file)


@pytest.mark.parametrize("name", ["answer", "finish_reason", "prompt_tokens", "generated_tokens"])
def test_a_prompt_with_a_key_that_answers_add_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{{"prompt": "a", "{name}": "the right one"}}\n')
    with pytest.raises(OffloadError, match=f"line 2 has a value '{name}' already"):
        read_prompt_lines(file)


def test_prompts_from_other_systems_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf"one"\r\n{"prompt": "two"}\r\n"three"')
    assert [given["prompt"] for given in read_prompt_lines(file)] == ["one", "two", "three"]


def test_a_line_that_is_too_long_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    third = MOST_CHARACTERS // 3
    file.write_text(f'"{"x" * third}"\n' * 4)
    assert len(read_prompt_lines(file)) == 4, "a file may be longer than a line"
    file.write_text('"short"\n"' + "x" * MOST_CHARACTERS)
    with pytest.raises(OffloadError, match="line 2 has more"):
        read_prompt_lines(file)


def test_the_system_prompt_of_a_line_replaces_that_of_the_command() -> None:
    user = {"role": "user", "content": "hi"}
    own = {"role": "system", "content": "own"}
    assert conversation_of({"messages": [own, user]}, "given").messages == [own, user]
    given = {"role": "system", "content": "given"}
    assert conversation_of({"prompt": "hi"}, "given").messages == [given, user]


@pytest.mark.parametrize(
    "given",
    [{"prompt": "a", "score": float("nan")}, {"prompt": "a", "id": "half \ud83d"}],
    ids=["nan", "surrogate"],
)
def test_a_file_with_odd_values_beside_the_prompt_can_be_continued(
    given: dict[str, Any], tmp_path: Path
) -> None:
    for count in (0, 1):
        answers = AnswersFile(tmp_path / "answers.jsonl")
        assert answers.done([given] * 2) == count
        answers.append(given, {"answer": "b"})
        answers.close()


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "number 0", "id": 0}\n',  # the prompts themselves
        '{"prompt": "number 0", "id": 0}',
        "three pages without a line's end",
        '"number 0"\n',
        "[]\n",
        "\n",
        '{"prompt": "number 0", "id": 0, "answer": "a"}\n\n',
    ],
)
def test_a_file_of_something_else_is_never_cut(text: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    answers = AnswersFile(file)
    with pytest.raises(OffloadError, match="does not match the prompts"):
        answers.done(GIVEN)
    answers.close()
    assert file.read_text() == text


def test_more_answers_than_prompts_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswersFile(file)
    answers.done(GIVEN)
    answers.append(GIVEN[0], {"answer": "a"})
    answers.append(GIVEN[1], {"answer": "b"})
    with pytest.raises(OffloadError, match="line 2"):
        answers.done(GIVEN[:1])
    answers.close()


@pytest.mark.parametrize("size", range(1, 30))
def test_half_a_line_is_recognised_wherever_it_ends(size: int, tmp_path: Path) -> None:
    whole = b'{"prompt": "number 0", "id": 0, "answer": "yes"}'
    file = tmp_path / "answers.jsonl"
    for half in (whole[:size], whole[:-size]):
        file.write_bytes(half)
        answers = AnswersFile(file)
        assert answers.done(GIVEN) == 0
        answers.close()
        assert file.read_bytes() == b""


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    answers = AnswersFile(tmp_path / "answers.jsonl")
    answers.done(GIVEN)
    answers.append(GIVEN[0], {"answer": "a"})
    answers.close()
    assert (tmp_path / "answers.jsonl").is_symlink()
    assert (tmp_path / "elsewhere.jsonl").read_bytes().endswith(b'"answer": "a"}\n')


@pytest.mark.parametrize("name", [".", "pipe", "no/folder/x", "locked/x"])
def test_a_place_where_answers_cannot_be_kept_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").mkdir(mode=0o500)
    if name.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("the superuser may write anywhere")
    with pytest.raises(OffloadError, match=r"is not a file|cannot write"):
        AnswersFile(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locked", "pipe"]


def test_half_a_line_is_cut_off_and_answered_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswersFile(file)
    assert answers.done(GIVEN) == 0
    answers.append(GIVEN[0], {"answer": "שלום"})
    answers.close()
    whole = file.read_bytes()
    with file.open("ab") as handle:
        handle.write(b'{"prompt": "numb')
    answers = AnswersFile(file)
    assert answers.done(GIVEN) == 1
    answers.append(GIVEN[1], {"answer": "b"})
    answers.close()
    assert file.read_bytes().startswith(whole)
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


def test_answers_to_other_prompts_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "another", "answer": "x"}\n')
    answers = AnswersFile(file)
    with pytest.raises(OffloadError, match="line 1"):
        answers.done(GIVEN)
    answers.close()
    assert file.read_text() == '{"prompt": "another", "answer": "x"}\n'


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    answers = AnswersFile(tmp_path / "answers.jsonl")
    with pytest.raises(OffloadError, match="another process"):
        AnswersFile(tmp_path / "answers.jsonl")
    answers.close()


def test_a_file_that_has_the_name_of_a_lock_stays(tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("version = 1")
    with closing(AnswersFile(tmp_path / "uv")):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["uv.lock"]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswersFile(file)
    answers.done(GIVEN)
    answers.append(GIVEN[0], {"answer": "a"})
    whole = file.read_bytes()

    pwrite = os.pwrite

    def half(handle: int, data: bytes, at: int) -> int:
        pwrite(handle, data[:5], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OffloadError, match="No space left"):
        answers.append(GIVEN[1], {"answer": "b"})
    answers.close()
    assert file.read_bytes() == whole


def _arguments(mixtral: Path, folder: Path) -> list[str]:
    named = ["-f", str(_prompts(folder)), "-o", str(folder / "answers.jsonl")]
    return ["generate", str(mixtral), *named, "-n", "4", "--temp", "0", "-np", "2"]


def _answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_command_answers_every_line_and_continues_where_it_stopped(
    mixtral: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(mixtral, tmp_path)) == 0
    said = _answers(tmp_path)
    assert [answer["id"] for answer in said] == list(range(6))
    assert all(answer["generated_tokens"] == 4 for answer in said)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]) + b'{"prom')
    capsys.readouterr()
    assert main(_arguments(mixtral, tmp_path)) == 0
    assert "3 of 6 prompts are already answered" in capsys.readouterr().err
    assert [answer["id"] for answer in _answers(tmp_path)] == list(range(6))


def test_the_error_names_a_prompt_that_cannot_be_answered(
    mixtral: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(mixtral, tmp_path)
    (tmp_path / "prompts.jsonl").write_text('"a"\n\n"b"\n"' + "x" * 300 + '"\n')
    assert main([*arguments, "-c", "256"]) == 1
    assert "prompts.jsonl, prompt 3: the prompt has" in capsys.readouterr().err
    assert len(_answers(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_kill_loses_no_line_that_was_written(mixtral: Path, home: Path, tmp_path: Path) -> None:
    arguments = _arguments(mixtral, tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments], stderr=subprocess.DEVNULL, cwd=Path.cwd()
    )
    file, end = tmp_path / "answers.jsonl", time.monotonic() + 60
    while not (file.exists() and file.read_bytes().count(b"\n")) and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = file.read_bytes()
    assert before.count(b"\n") >= 1
    assert main(arguments) == 0
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert [answer["id"] for answer in _answers(tmp_path)] == list(range(6))
