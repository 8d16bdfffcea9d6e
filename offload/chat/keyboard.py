"""The keyboard while no line is read: keys stay off the screen, and Ctrl-Z leaves a terminal in
order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

PASTES, NO_PASTES = "\x1b[?2004h", "\x1b[?2004l"  # whether the terminal marks what is pasted


def is_interactive() -> bool:
    """Whether somebody types at a terminal and sees the answers there."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def announce_pastes() -> None:
    """Let text that is pasted from now on reach the next prompt as one message."""
    if is_interactive():
        print(PASTES, end="", flush=True)


def silence() -> None:
    """Switch the terminal's echo off, and let Ctrl-C and Ctrl-Z drop nothing that was typed.

    A terminal on Windows echoes only what a program reads.
    """
    if sys.platform != "win32" and is_interactive():
        import termios

        now = termios.tcgetattr(sys.stdin.fileno())
        now[3] = now[3] & ~termios.ECHO | termios.NOFLSH
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, now)
        announce_pastes()


@contextlib.contextmanager
def silent(moved: Callable[[], None]) -> Iterator[None]:
    """Switch the terminal's echo off, and restore it however this ends.

    What is typed meanwhile waits in the terminal for the next prompt. `moved` is called when the
    program goes on after it was stopped, because the shell has written in between.
    """
    if sys.platform == "win32" or not is_interactive():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def restore() -> None:
        with contextlib.suppress(termios.error, OSError):  # the terminal may be gone
            termios.tcsetattr(terminal, termios.TCSANOW, before)
            print(NO_PASTES, end="", flush=True)

    def stop(number: int, _: Any) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # returns when the program goes on
        signal.signal(number, stop)

    def go_on(*_: Any) -> None:
        silence()
        moved()

    handlers = {signal.SIGTSTP: stop, signal.SIGCONT: go_on}
    replaced = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        silence()
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        restore()
