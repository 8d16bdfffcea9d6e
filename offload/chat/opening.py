"""The beginning of a chat: a line can be typed while the model loads."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time
from typing import Any, Self, TextIO

from prompt_toolkit.application import run_in_terminal
from rich.spinner import Spinner

from offload.chat.commands import HELP_WORDS, KEYS, LEAVING, USAGE
from offload.chat.display import Display
from offload.chat.keyboard import silence
from offload.chat.terminal import LineReader

FRAMES, TURN_SECONDS = Spinner("dots").frames, 0.1
# While prompt_toolkit reads on a thread, Ctrl-Z is its business alone; Windows has no such signals.
STOPS = [getattr(signal, name) for name in ("SIGTSTP", "SIGCONT") if hasattr(signal, name)]


class Opening:
    """Reads the first message on a thread of its own while the `with` block loads the model.

    The model loads on the main thread, where Ctrl-C reaches it. What is written to stderr meanwhile
    appears when the model is there. If something draws on stderr, such as the progress of a
    download, the line is taken away, and its text comes back with the next prompt.
    """

    def __init__(self, display: Display, first: str | None = None) -> None:
        """`first` is the first message if the user gave one with the command."""
        self.left = False  # whether the user left before the model was there
        self.display = display
        self._read = LineReader()
        self._line: str | None = None
        self._given = first
        self._error: BaseException | None = None  # ended the reading of the line
        self._kept = ""  # text of a line that was taken away
        self._loaded = self._away = False
        self._over = threading.Event()  # nobody waits for the model any more
        self._thread: threading.Thread | None = threading.Thread(target=self._type, daemon=True)

    def __enter__(self) -> Self:
        self._stderr, self._aside = sys.stderr, _Aside(sys.stderr, self)
        sys.stderr = self._aside
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stderr:
                handler.setStream(self._aside)
        self._handlers = [signal.signal(number, signal.SIG_DFL) for number in STOPS]
        assert self._thread is not None
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._loaded = True
        self._over.set()
        sys.stderr = self._stderr
        if kind is not None:
            self.give_way()
            if self._error is not None and not isinstance(self._error, EOFError):
                raise self._error from None
        elif self._line is not None or self._given is not None:
            self._join()
        else:
            self._in_loop(lambda: run_in_terminal(self._aside.release))
        return self.left

    def __call__(self, prompt: str) -> str:
        """The next message. Raises `EOFError` when there will be none."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        line, self._line = self._line, None
        if line is not None:
            return line
        kept, self._kept = self._kept, ""
        return self._read(prompt, default=kept)

    def give_way(self) -> None:
        """Take the line, or what is shown in its place, off the terminal."""
        if self._thread is not None:
            self._away = True
            self._over.set()
            self._in_loop(self._take_away)
            self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._aside.release()
            self._read.aside = str
            for number, handler in zip(STOPS, self._handlers, strict=True):
                signal.signal(number, handler)
            silence()

    def _in_loop(self, do: Any) -> None:
        loop = self._read.session.app.loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the line was entered, and the loop is closed
                loop.call_soon_threadsafe(do)

    def _take_away(self) -> None:
        session = self._read.session
        if self._away and session.app.is_running and not session.app.is_done:
            self._kept = session.default_buffer.text
            session.app.erase_when_done = True
            session.app.exit(exception=_Away())

    def _begin_line(self) -> None:
        self._take_away()  # if it was asked for before there was a line
        self._read.session.app.create_background_task(self._turn())

    async def _turn(self) -> None:
        while not self._loaded:
            await asyncio.sleep(TURN_SECONDS)
            self._read.session.app.invalidate()

    def _turning(self) -> str:
        return (
            ""
            if self._loaded
            else f"{FRAMES[int(time.monotonic() / TURN_SECONDS) % len(FRAMES)]} loading"
        )

    def _type(self) -> None:
        """Read the line, then show that the model still loads."""
        try:
            self._read.aside = self._turning
            while self._line is None and self._given is None:
                line = self._read(">>> ", pre_run=self._begin_line)
                if line.strip() in HELP_WORDS:
                    self.display.table((*USAGE, *KEYS))
                elif line.strip():
                    self._line = line
        except BaseException as error:
            self._read.session.app.erase_when_done = False
            if not self._away:
                self._error = error
        if self._over.is_set():
            return
        if self._error is not None or (self._line or "").strip() in LEAVING:
            self.left = self._line is not None or isinstance(self._error, EOFError)
            _interrupt_main()
        else:
            self.display.wait("Loading")
            self._over.wait()
            self.display.rest()


def _interrupt_main() -> None:
    """Ctrl-C in the main thread, even where it waits in the operating system."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


class _Away(Exception):
    """The line was taken away."""


class _Aside:
    """A stream in the place of stderr, which keeps what is written until it is released.

    Carriage returns and escapes are drawing: they release it at once. Libraries that keep this
    stream write to stderr for ever after.
    """

    def __init__(self, stream: TextIO, opening: Opening) -> None:
        self._stream, self._opening = stream, opening
        self._kept: list[str] | None = []

    def write(self, text: str) -> int:
        if self._kept is not None and ("\r" in text or "\x1b" in text):
            self._opening.give_way()
        if self._kept is None:
            return self._stream.write(text)
        self._kept.append(text)
        return len(text)

    def release(self) -> None:
        """Show what was kept, and keep no more."""
        kept, self._kept = self._kept, None
        if kept and self._stream.isatty():
            self._opening.display.note("".join(kept))
        elif kept:
            self._stream.write("".join(kept))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
