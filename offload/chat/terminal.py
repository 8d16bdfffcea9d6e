"""The terminal of a chat, or the pipe in its place: where lines come from and where answers go."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from offload.chat.commands import WORDS
from offload.chat.display import Display, Plain, Rendered
from offload.chat.saved import saved_names
from offload.files import offload_home


class Slashes(Completer):
    """Completes slash commands, and leaves messages alone."""

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        if text.startswith("/read "):  # a file name may contain spaces
            file = Document(text.removeprefix("/read ").lstrip())
            yield from PathCompleter(expanduser=True).get_completions(file, complete_event)
            return
        before, _, word = text[1:].rpartition(" ")
        names = before in ("load", "save")
        for candidate in saved_names() if names else WORDS.get(before.strip(), ()):
            if candidate.startswith(word):
                yield Completion(candidate, -len(word))


def reader() -> Callable[[str], str]:
    """Return a function that asks for one message and raises `EOFError` at the end of the input.

    At a terminal it offers editing, history and completion: Alt-Enter begins a new line, Enter does
    so inside three quotes, and pasted text stays one message. Elsewhere it reads a line of stdin
    and shows no prompt.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 must not end the chat
        return _read_plain
    return PromptSession[str](
        history=_history(),
        completer=Slashes(),
        complete_while_typing=False,  # otherwise the arrow keys would choose completions
        multiline=True,
        prompt_continuation="... ",
        key_bindings=_keys(),
    ).prompt


def is_open(text: str) -> bool:
    """Whether a message was opened with three quotes and is not closed yet."""
    return text.startswith('"""') and not text.rstrip()[3:].endswith('"""')


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

    return keys


def display() -> Display:
    """Return what shows the answers: Markdown at a terminal, plain text elsewhere or when
    `NO_COLOR` or a dumb terminal asks for it."""
    console = Console(soft_wrap=False)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if console.is_terminal and sys.stdout.isatty() and not plain:
        return Rendered(console)
    return Plain(partial(print, end="", flush=True), safe=sys.stdout.isatty())


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
