"""The terminal of a chat, or the pipe in its place: where lines come from and where answers go."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from offload.chat.commands import QUOTES, WORDS
from offload.chat.display import Display, Plain, Rendered
from offload.chat.keyboard import announce_pastes, is_interactive
from offload.chat.saved import saved_names
from offload.files import offload_home

HINT = "Send a message (/? for help)"
FILE_COMMANDS = ("/read ", "/write ")


class Slashes(Completer):
    """Completes slash commands, and leaves messages alone."""

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        for command in FILE_COMMANDS:
            if text.startswith(command):  # a file name may contain spaces
                file = Document(text.removeprefix(command).lstrip())
                yield from PathCompleter(expanduser=True).get_completions(file, complete_event)
                return
        before, _, word = text[1:].rpartition(" ")
        before = before.strip().replace("set parameter", "set")
        names = before in ("load", "save")
        for candidate in saved_names() if names else WORDS.get(before, ()):
            if candidate.startswith(word):
                yield Completion(candidate, -len(word))


class LineReader:
    """Asks for one message at a terminal, with editing, history and completion.

    Alt-Enter begins a new line, Enter does so inside three quotes, and pasted text stays one
    message. Ctrl-Z suspends the program.
    """

    def __init__(self) -> None:
        self.aside: Callable[[], str] = str  # what stands at the right edge of the line
        self.session = PromptSession[str](
            history=_history(),
            completer=Slashes(),
            complete_while_typing=False,  # otherwise the arrow keys would choose completions
            multiline=True,
            prompt_continuation=lambda width, _, wraps: " " * width if wraps else "... ",
            key_bindings=_keys(),
            placeholder=lambda: self._grey("" if get_app().is_done else HINT),
            rprompt=lambda: self._grey("" if get_app().is_done else self.aside()),
        )

    def __call__(self, prompt: str, **options: Any) -> str:
        """One message; `options` are those of prompt_toolkit. Raises `EOFError` after Ctrl-D."""
        try:
            return self.session.prompt(prompt, **options)
        finally:
            announce_pastes()

    @staticmethod
    def _grey(text: str) -> FormattedText:
        return FormattedText([("ansibrightblack", text)])


def reader() -> Callable[[str], str]:
    """Return a function that asks for one message and raises `EOFError` at the end of the input.

    Without a terminal it reads a line of stdin and shows no prompt.
    """
    if is_interactive():
        return LineReader()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 must not end the chat
    return _read_plain


def is_open(text: str) -> bool:
    """Whether a message was opened with three quotes and is not closed yet."""
    return text.startswith(QUOTES) and not text.rstrip()[3:].endswith(QUOTES)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    if sys.platform != "win32":

        @keys.add("c-z")
        def _(event: KeyPressEvent) -> None:
            run_in_terminal(_stop)

    return keys


def _stop() -> None:
    """Suspend this program and those that it shares a pipeline with.

    If this is not the main thread, it must not run on before another thread has met the signal:
    it would set the terminal's modes, which the shell then changes.
    """
    os.kill(0, signal.SIGTSTP)
    time.sleep(0.05)


def display(*, single_turn: bool = False) -> Display:
    """Return what shows the answers: Markdown at a terminal, plain text elsewhere or at a dumb one.

    Figures and notices go to stderr when stdout holds answers only: in a file, a pipe, or with
    `single_turn`.
    """
    console = Console(soft_wrap=False)
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return Rendered(console, Console(stderr=True) if single_turn else None)
    write = partial(print, end="", flush=True)
    if sys.stdout.isatty():
        return Plain(write)
    return Plain(write, note=lambda text: write(text, file=sys.stderr), safe=False)


class _History(FileHistory):
    """A history file. If a line cannot be stored, on a full disk say, the chat goes on."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history() -> History:
    file = offload_home() / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        if not file.is_file():
            raise OSError("it is not a file")
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
