"""The chat at a real terminal, its screen compared line by line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

ROOT = Path(__file__).parents[3]
ROWS, COLUMNS = 30, 80
MARKDOWN = "**Hi** שלום 👋🏽\n\n- one\n- two\n\n```python\nx = 1\n```\n"
THOUGHT = "<think>\nhm\n</think>\n\nYes."


class Terminal:
    """A program on a pseudo-terminal, and what its screen shows."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        environment = {
            **os.environ,
            "OFFLOAD_HOME": str(home),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("NO_COLOR", None)
        self.child = pexpect.spawn(
            sys.executable, arguments, cwd=str(ROOT), env=environment, dimensions=(ROWS, COLUMNS)
        )

    @property
    def lines(self) -> list[str]:
        """The lines of the screen that are not empty and not about loading."""
        shown = (line.rstrip() for line in self.screen.display)
        return [line for line in shown if line and not line.startswith("Loading ")]

    def wait(self, shown: Callable[[list[str]], bool], seconds: float = 300) -> None:
        """Until the screen is as wanted."""
        end = time.monotonic() + seconds
        while not shown(self.lines):
            assert time.monotonic() < end, "\n".join(["never shown:", *self.lines])
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.1))
            except pexpect.TIMEOUT:
                continue

    def ask(self, keys: str) -> None:
        """Type `keys` and wait for the next prompt."""
        before = sum(line.startswith(">>>") for line in self.lines)
        self.child.send(keys + "\r")
        self.wait(lambda lines: sum(line.startswith(">>>") for line in lines) > before)


@pytest.fixture
def terminal(mixtral_pack: Path, home: Path) -> Iterator[Terminal]:
    answers = [MARKDOWN, THOUGHT, THOUGHT, "last"]
    shown = Terminal(["-m", "tests.scripted_chat", str(mixtral_pack), *answers], home)
    shown.wait(lambda lines: bool(lines) and lines[-1] == ">>>")
    yield shown
    shown.child.close(force=True)


def test_a_conversation_on_the_screen(terminal: Terminal, home: Path) -> None:
    assert terminal.lines[0].endswith("/? lists the commands, /bye exits")
    terminal.ask("hello שלום")
    assert terminal.lines[1:] == [
        ">>> hello שלום",
        "Hi שלום 👋🏽",
        " • one",
        " • two",
        " x = 1",
        ">>>",
    ]
    terminal.child.send('"""two')  # three quotes open, Enter does not send
    terminal.child.send("\r")
    terminal.wait(lambda lines: lines[-1].startswith("..."))
    terminal.ask('lines"""')
    assert terminal.lines[6:] == [
        '>>> """two',
        '... lines"""',
        "Thinking...",
        "hm",
        "...done thinking.",
        "Yes.",
        ">>>",
    ]
    terminal.child.send("/set tho\t")  # completed
    terminal.wait(lambda lines: lines[-1] == ">>> /set thoughts")
    terminal.ask(" hide")
    terminal.ask("again")
    assert terminal.lines[12:] == [">>> /set thoughts hide", ">>> again", "Yes.", ">>>"]
    terminal.child.send("\x1b[A")  # the history
    terminal.wait(lambda lines: lines[-1] == ">>> again")
    terminal.child.send("\x03")
    terminal.wait(lambda lines: "Ctrl-D leaves" in "".join(lines[-2:]) and lines[-1] == ">>>")
    terminal.child.send("\x04")
    terminal.child.expect(pexpect.EOF)
    terminal.child.wait()
    assert terminal.child.exitstatus == 0
    assert "+lines" in (home / "history").read_text(encoding="utf-8")


def test_a_panel_is_there_while_an_answer_comes_and_gone_after_it(terminal: Terminal) -> None:
    terminal.ask("/set panel on")
    terminal.child.send("hello\r")
    terminal.wait(lambda lines: any("t/s, hits" in line for line in lines))
    terminal.wait(lambda lines: lines[-1] == ">>>" and " x = 1" in lines)
    assert not any("t/s, hits" in line or line.startswith("layers") for line in terminal.lines)
