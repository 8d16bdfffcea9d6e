"""The chat at a real terminal, its screen compared line by line."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pyte
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

ROOT = Path(__file__).parents[3]
ROWS, COLUMNS = 30, 80
PROMPT = ">>> Send a message (/? for help)"
BANNER = "24 of 24 experts in memory (100%). /? for help, /bye to quit"
MARKDOWN = "**Hi** שלום 👋🏽\n\n- one\n- two\n\n```python\nx = 1\n```\n"
THOUGHT = "<think>\nhm\n</think>\n\nYes."
SEA = " ".join(f"word{number}" for number in range(50))


class Terminal:
    """A program on a pseudo-terminal, and what its screen shows."""

    def __init__(self, command: list[str], home: Path, **environment: str) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        environment = {
            **os.environ,
            "OFFLOAD_HOME": str(home),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "OMP_NUM_THREADS": "1",
            "PS1": "$ ",
            **environment,
        }
        if environment.get("NO_COLOR") != "1":
            environment.pop("NO_COLOR", None)
        self.child = pexpect.spawn(
            command[0], command[1:], cwd=str(ROOT), env=environment, dimensions=(ROWS, COLUMNS)
        )

    @property
    def lines(self) -> list[str]:
        """The lines of the screen that are not empty and not about loading."""
        shown = (line.rstrip() for line in self.screen.display)
        return [line for line in shown if line and not line.startswith("Loading ")]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.child.child_fd)[3] & termios.ECHO)

    def wait(self, shown: Callable[[list[str]], bool], seconds: float = 100) -> None:
        """Until the screen is as wanted."""
        end = time.monotonic() + seconds
        while not shown(self.lines):
            assert time.monotonic() < end, "\n".join(["never shown:", *self.lines])
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.1))
            except pexpect.TIMEOUT:
                continue

    def wait_for(self, text: str) -> None:
        self.wait(lambda lines: any(text in line for line in lines))

    def ask(self, keys: str) -> None:
        """Type `keys` and wait for the next prompt."""
        before = sum(line.startswith(">>>") for line in self.lines)
        self.child.send(keys + "\r")
        self.wait(lambda lines: sum(line.startswith(">>>") for line in lines) > before)

    def end(self) -> int:
        """Wait for the program's end, and return its exit code."""
        self.child.expect(pexpect.EOF)
        self.child.wait()
        assert self.child.exitstatus is not None
        return int(self.child.exitstatus)


@pytest.fixture
def start(mixtral_pack: Path, home: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts chats that answer with given texts, and ends them after the test."""
    started = []

    def begin(*answers: str, **environment: str) -> Terminal:
        command = [sys.executable, "-m", "tests.scripted_chat", str(mixtral_pack), *answers]
        started.append(Terminal(command, home, **environment))
        return started[-1]

    yield begin
    for terminal in started:
        terminal.child.close(force=True)


@pytest.fixture
def terminal(start: Callable[..., Terminal]) -> Terminal:
    shown = start(MARKDOWN, THOUGHT, THOUGHT, "last")
    shown.wait(lambda lines: BANNER in lines and lines[-1] == PROMPT)
    return shown


def test_a_conversation_on_the_screen(terminal: Terminal, home: Path) -> None:
    begin = terminal.lines.index(BANNER)
    terminal.ask("hello שלום")
    assert terminal.lines[begin + 1 :] == [
        ">>> hello שלום",
        "Hi שלום 👋🏽",
        " • one",
        " • two",
        "x = 1",
        PROMPT,
    ]
    terminal.child.send("x" * 80)  # a line that is wrapped, and not two lines
    terminal.wait(lambda lines: lines[-2:] == [">>> " + "x" * 76, "    xxxx"])
    terminal.child.send("\x15")
    terminal.child.send('"""two')  # three quotes open, Enter does not send
    terminal.child.send("\r")
    terminal.wait(lambda lines: lines[-1].startswith("..."))
    terminal.ask('lines"""')
    assert terminal.lines[begin + 6 :] == [
        '>>> """two',
        '... lines"""',
        "Thinking...",
        "hm",
        "...done thinking.",
        "Yes.",
        PROMPT,
    ]
    terminal.child.send("/set tho\t")  # completed
    terminal.wait(lambda lines: lines[-1] == ">>> /set thoughts")
    terminal.ask(" hide")
    terminal.ask("again")
    told = "Set thoughts to hide."
    shown = [">>> /set thoughts hide", told, ">>> again", "Yes.", PROMPT]
    assert terminal.lines[begin + 12 :] == shown
    terminal.child.send("\x1b[A")  # the history
    terminal.wait(lambda lines: lines[-1] == ">>> again")
    terminal.child.send("\x03")
    terminal.wait(lambda lines: "press Ctrl-D" in "".join(lines[-2:]) and lines[-1] == PROMPT)
    terminal.child.send("\x04")
    assert terminal.end() == 0
    assert "+lines" in (home / "history").read_text(encoding="utf-8")


def test_a_panel_stays_below_the_answer(terminal: Terminal) -> None:
    terminal.ask("/set panel on")
    terminal.child.send("hello\r")
    terminal.wait(lambda lines: any("t/s, hits" in line for line in lines))
    terminal.wait(lambda lines: lines[-1] == PROMPT and "x = 1" in lines)
    at = next(at for at, line in enumerate(terminal.lines) if "t/s, hits" in line)
    *layers, legend = terminal.lines[at + 1 : at + 5]
    assert [line.split("  ")[0].strip().split(" ")[0] for line in layers] == ["layer"] * 3
    assert "in memory" in legend
    assert sum("t/s, hits" in line for line in terminal.lines) == 1


# --- the keyboard while an answer comes -----------------------------------------------------------


def test_keys_typed_during_an_answer_wait_for_the_next_prompt(
    start: Callable[..., Terminal],
) -> None:
    terminal = start(SEA, "two", STEP_SECONDS="0.01")
    terminal.wait(lambda lines: lines[-1:] == [PROMPT])
    terminal.child.send("tell\r")
    terminal.wait_for("word3 ")
    assert not terminal.echoes
    terminal.child.send("and then")
    terminal.wait_for("word40")
    assert "and then" not in terminal.text
    terminal.wait(lambda lines: lines[-1] == ">>> and then")
    assert "".join(terminal.text.split()).count("word0word1") == 1
    terminal.child.send("?\r")
    terminal.wait(lambda lines: lines[-2:] == ["two", PROMPT])


def test_ctrl_c_drops_nothing_that_was_typed_during_an_answer(
    start: Callable[..., Terminal],
) -> None:
    terminal = start(SEA, "two", STEP_SECONDS="0.05")
    terminal.wait(lambda lines: lines[-1:] == [PROMPT])
    terminal.child.send("tell\r")
    terminal.wait_for("word3 ")
    terminal.child.send("and then")
    terminal.wait_for("word6 ")
    terminal.child.send("\x03")
    terminal.wait(lambda lines: lines[-1] == ">>> and then")


def test_text_pasted_during_an_answer_stays_one_message(start: Callable[..., Terminal]) -> None:
    terminal = start(SEA, "two", STEP_SECONDS="0.01")
    terminal.wait(lambda lines: lines[-1:] == [PROMPT])
    terminal.child.send("tell\r")
    terminal.wait_for("word3 ")
    terminal.child.send("\x1b[200~first\rsecond\x1b[201~")
    terminal.wait(lambda lines: lines[-2:] == [">>> first", "... second"])


@pytest.mark.parametrize("way", ["bye", "SIGTERM", "answer"])
def test_the_terminal_echoes_again_after_every_end(
    way: str, start: Callable[..., Terminal]
) -> None:
    terminal = start(SEA, STEP_SECONDS="0.02")
    terminal.wait(lambda lines: lines[-1:] == [PROMPT])
    if way == "bye":
        terminal.child.send("/bye\r")
    else:
        if way == "answer":
            terminal.child.send("tell\r")
            terminal.wait_for("word3 ")
        terminal.child.kill(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while not (terminal.echoes and psutil.Process(terminal.child.pid).status() == "zombie"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_z_suspends_at_the_prompt_and_during_an_answer(
    mixtral_pack: Path, home: Path, tmp_path: Path
) -> None:
    script = tmp_path / "chat"
    chat = f"exec {sys.executable} -m tests.scripted_chat {mixtral_pack} '{SEA}'"
    script.write_text(f"#!/bin/bash\n{chat}\n")
    script.chmod(0o700)
    shell = ["bash", "--norc", "--noprofile", "-i"]
    terminal = Terminal(shell, home, STEP_SECONDS="0.02", CHAT=str(script))
    try:
        terminal.wait(lambda lines: lines[-1:] == ["$"])
        terminal.child.send("$CHAT\r")
        terminal.wait(lambda lines: lines[-1:] == [PROMPT])
        terminal.child.send("tell\x1a")
        terminal.wait(lambda lines: "Stopped" in lines[-2] and lines[-1] == "$")
        assert "^Z" not in terminal.text
        terminal.child.send("fg\r")
        terminal.wait(lambda lines: lines[-1] == ">>> tell")
        terminal.child.send("\r")
        terminal.wait_for("word3 ")
        terminal.child.send("\x1a")
        terminal.wait(lambda lines: "Stopped" in lines[-2] and lines[-1] == "$")
        terminal.child.send("echo $((40 + 2))\r")
        terminal.wait(lambda lines: lines[-2:] == ["42", "$"])
        terminal.child.send("fg\r")
        terminal.wait(lambda lines: lines[-1] == PROMPT)
        shells = ("$", "[1]", "42", str(script)[:20])
        ours = [line for line in terminal.lines if not line.startswith(shells)]
        assert "".join("".join(ours).split()).count("".join(SEA.split())) == 1
    finally:
        terminal.child.close(force=True)


def test_a_resize_during_an_answer_loses_and_repeats_nothing(
    start: Callable[..., Terminal],
) -> None:
    terminal = start(SEA, STEP_SECONDS="0.01")
    terminal.wait(lambda lines: lines[-1:] == [PROMPT])
    terminal.child.send("tell\r")
    terminal.wait_for("word20")
    terminal.child.setwinsize(ROWS, 50)
    terminal.wait(lambda lines: lines[-1] == PROMPT)
    assert "".join(terminal.text.split()).count("".join(SEA.split())) == 1


# --- while the model loads ------------------------------------------------------------------------


def test_a_line_can_be_typed_while_the_model_loads(start: Callable[..., Terminal]) -> None:
    terminal = start("yes", LOAD_SECONDS="3")
    terminal.wait(lambda lines: "loading" in "".join(lines[-1:]))
    terminal.child.send("hel")
    terminal.wait(lambda lines: lines[-1].startswith(">>> hel") and "loading" in lines[-1])
    terminal.wait(lambda lines: lines[-3:] == ["a note", BANNER, ">>> hel"])
    terminal.ask("lo")
    assert terminal.lines[-3:] == [">>> hello", "yes", PROMPT]


def test_a_message_sent_while_the_model_loads_is_answered(start: Callable[..., Terminal]) -> None:
    terminal = start("yes", LOAD_SECONDS="3")
    terminal.wait(lambda lines: "loading" in "".join(lines[-1:]))
    terminal.child.send("/?\r")
    terminal.wait_for("/regen")
    terminal.child.send("hello\r")
    terminal.wait(lambda lines: lines[-1].endswith("Loading..."))
    terminal.wait(lambda lines: lines[-1] == PROMPT and BANNER in lines)
    assert terminal.lines[-5:] == [">>> hello", "a note", BANNER, "yes", PROMPT]


def test_what_draws_while_the_model_loads_gets_the_terminal(start: Callable[..., Terminal]) -> None:
    terminal = start("yes", LOAD_SECONDS="3", DRAWN="\r50% of it\n")
    terminal.wait(lambda lines: "loading" in "".join(lines[-1:]))
    terminal.child.send("hel")
    terminal.wait(lambda lines: lines[-1].startswith(">>> hel"))
    terminal.wait(lambda lines: lines[-4:] == ["a note", "50% of it", BANNER, ">>> hel"])


@pytest.mark.parametrize(("keys", "code"), [("/bye\r", 0), ("\x04", 0), ("\x03", 130)])
def test_one_can_leave_while_the_model_loads(
    keys: str, code: int, start: Callable[..., Terminal]
) -> None:
    terminal = start(LOAD_SECONDS="60")
    terminal.wait(lambda lines: "loading" in "".join(lines[-1:]))
    terminal.child.send(keys)
    assert terminal.end() == code


def test_without_colours_the_layout_is_the_same(start: Callable[..., Terminal]) -> None:
    terminal = start(MARKDOWN, NO_COLOR="1")
    terminal.wait(lambda lines: lines[-1:] == [PROMPT])
    terminal.ask("hello")
    assert terminal.lines[-5:] == ["Hi שלום 👋🏽", " • one", " • two", "x = 1", PROMPT]
    cells: Any = terminal.screen.buffer
    assert {cells[row][column].fg for row in range(ROWS) for column in range(COLUMNS)} == {
        "default"
    }
