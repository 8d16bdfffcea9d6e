"""Standard streams that are closed, full or abandoned, and what is printed on stderr."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
from offload import OffloadError
from offload.chat import terminal
from offload.chat.commands import read_message
from offload.files import MOST_CHARACTERS, read_text
from tests.conftest import Script

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


def _shell(line: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Run the shell line `line`, where "$@" is the command; return exit code, stdout and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "-", sys.executable, "-m", "cli", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=600,
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode()


def _one_error(text: str) -> str:
    assert text.startswith("offload: error: ")
    assert text.count("\n") == 1
    assert "a bug" not in text
    return text


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "demo", "-p", "hi")])
def test_a_closed_stdout_is_an_error(arguments: tuple[str, ...]) -> None:
    code, _, errors = _shell('"$@" >&-', *arguments)
    assert code == 1
    assert "stdout is closed" in _one_error(errors)


def test_a_full_stdout_is_an_error() -> None:
    code, _, errors = _shell('"$@" >/dev/full', "--help")
    assert code == 1
    assert "cannot write to stdout: No space left" in _one_error(errors)


def test_an_answer_into_a_full_disk_is_told(mixtral_pack: Path) -> None:
    arguments = ("generate", mixtral_pack, "-p", "hi", "-n", "4")
    for shell in ('"$@" >/dev/full', 'PYTHONUNBUFFERED=1 "$@" >/dev/full'):
        code, _, errors = _shell(shell, *arguments)
        assert code == 1
        assert "cannot write to stdout: No space left" in _one_error(errors)


PYTHON_ANSWERS = """
import sys, torch, offload
model, tokenizer = offload.load(sys.argv[1], device="cpu")
offload.generate(model, tokenizer, "hi", max_new_tokens=3)
offload.generate(model, tokenizer, ["hi", "you"], max_new_tokens=3)
[*offload.stream_generate(model, tokenizer, "hi", max_new_tokens=3, temperature=1.0)]
inputs = tokenizer("hi", return_tensors="pt")
model.generate(**inputs, max_new_tokens=3, do_sample=False)
model.offload.close()
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-c", PYTHON_ANSWERS], ""),
        (["-m", "cli", "generate", "--no-show-timings", "-n", "3"], r"\(stopped at 3 tokens\)\n"),
        (
            ["-m", "cli", "chat", "--no-show-timings", "-n", "3"],
            r"24 of 24 .* /bye to quit\n\(stopped at 3 tokens\)\n",
        ),
        (["-m", "cli", "ppl"], r"\[ Experts: .* \]\n"),
    ],
    ids=["python", "generate", "chat", "ppl"],
)
def test_no_warning_of_a_library_reaches_the_user(
    arguments: list[str], expected: str, mixtral_pack: Path
) -> None:
    """In these processes a FutureWarning is an error, and only our own lines are printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", *arguments, mixtral_pack],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input="how are you?",
        encoding="utf-8",
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(expected, done.stderr)


def test_a_closed_stdin_is_an_empty_one() -> None:
    code, out, errors = _shell('"$@" <&-', "generate", "demo")
    assert (code, out) == (1, "")
    assert "there is no prompt" in _one_error(errors)


def test_errors_do_not_go_to_stdout_when_stderr_is_closed() -> None:
    assert _shell('"$@" 2>&-', "generate", "demo", "-p", "hi", "--temp", "-1") == (1, "", "")


@pytest.mark.parametrize("line", ['"$@" | true', '"$@" | head -1 >/dev/null'])
def test_a_reader_that_closes_the_pipe_is_not_an_error(line: str) -> None:
    assert _shell(line, "generate", "--help") == (0, "", "")


def test_a_character_that_stdout_cannot_encode_does_not_end_the_answer(
    mixtral_pack: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    script.say("a שלום b")
    assert cli.main(["generate", str(mixtral_pack), "-p", "hi", "--no-show-timings"]) == 0
    assert raw.getvalue() == b"a ???? b\n"


def test_a_piped_line_that_is_not_utf_8_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"a\xffb\nnext\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", piped)
    read = terminal.reader()
    assert [read_message(read)[0] for _ in range(2)] == ["a\udcffb", "next"]
    with pytest.raises(EOFError):
        read("")


def test_an_endless_pipe_is_refused() -> None:
    told = pytest.raises(OffloadError, match=f"more than {MOST_CHARACTERS} characters")
    with Path("/dev/zero").open(encoding="utf-8") as endless, told:
        read_text(endless, "the pipe")


@pytest.mark.parametrize("kind", ["folder", "missing parent"])
def test_a_history_that_cannot_be_kept_is_reported_once(
    kind: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "folder":
        (home / "history").mkdir()
    else:
        home.rmdir()
        home.write_text("in the way")
    terminal._history().append_string("one")
    assert capsys.readouterr().err.count("lines are not remembered") == 1


def test_a_history_continues_in_memory_when_its_disk_is_full(home: Path) -> None:
    history = terminal._history()
    (home / "history").unlink()
    (home / "history").symlink_to("/dev/full")
    history.append_string("one")
    assert history.get_strings() == ["one"]


def test_a_command_whose_messages_nobody_reads_fails(mixtral: Path, tmp_path: Path) -> None:
    """`offload quantize ... 2>&1 | head -1` fails if it cannot write a message, unlike `--help`."""
    command = [sys.executable, "-m", "cli", "quantize", str(mixtral), str(tmp_path / "pack")]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=write, timeout=600)
    os.close(write)
    assert ended.returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_command_under_nohup_goes_on_when_the_terminal_is_closed(
    mixtral_pack: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.say("yes")
    script.at = lambda _: os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["generate", str(mixtral_pack), "-p", "hi", "--no-show-timings"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().out == "yes\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_in_a_destructor_ends_the_command(
    number: int, mixtral_pack: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def at(step: int) -> None:
        if step == 1:
            Dying()
        time.sleep(0.1)

    script.say("a long answer")
    script.at = at
    try:
        code = cli.main(["generate", str(mixtral_pack), "-p", "hi"])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 128 + number
    assert not capsys.readouterr().err.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_terminated_chat_exits_cleanly(mixtral_pack: Path, home: Path) -> None:
    command = [sys.executable, "-m", "cli", "chat", str(mixtral_pack)]
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    while b"for help" not in child.stderr.readline():
        assert child.poll() is None
    child.terminate()
    assert child.wait(timeout=600) == 128 + signal.SIGTERM
    child.communicate()
