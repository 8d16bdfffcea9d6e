"""Where the chat's lines come from.

Knows: prompt_toolkit, and what to do when there is no terminal. Does not know: what the lines mean.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from offload.home import offload_home


def reader() -> Callable[[str], str]:
    """Asks for one line: with editing and history at a terminal, else from stdin without a prompt.

    Raises `EOFError` at the end of the input.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text ends no chat
        return _read_plain
    session: PromptSession[str] = PromptSession(history=_history())

    def read(prompt: str) -> str:
        return session.prompt(prompt)

    return read


class _History(FileHistory):
    """A history that a full disk makes forgetful, not one that ends the chat."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history() -> History:
    file = offload_home() / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        if not file.is_file():
            raise OSError("it is no file")
        with file.open("rb"):
            pass
    except OSError as error:
        print(f"offload: lines are not remembered: cannot use {file} ({error})", file=sys.stderr)
        return InMemoryHistory()
    return _History(str(file))


def _read_plain(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
