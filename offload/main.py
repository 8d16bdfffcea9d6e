"""The program `offload`: which commands there are, and how each of them ends."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pkgutil
import re
import signal
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from offload.errors import DONE, FAILED, INTERRUPTED, USAGE
from offload.flags import add_command
from offload.lines import is_memory, one_line, shortened
from offload.version import __version__

# Name -> a module or class, imported when the command is called, and one line of help. Each module
# or class has EXAMPLE, add_arguments(parser) and run(arguments), which returns an exit code.
COMMANDS = {
    "chat": ("offload.chat.command", "talk to a model"),
    "generate": ("offload.generation.command", "answer one prompt, or a file of prompts"),
    "bench": ("offload.bench.command", "measure tokens per second"),
    "plan": (
        "offload.plan.command",
        "tell what fits, with which bits and how fast, before a download",
    ),
    "doctor": (
        "offload.machine.command",
        "check this machine: versions, speeds, and what to improve",
    ),
    "quantize": ("offload.pack.command", "write a model's quantised weights to a folder (a pack)"),
    "ppl": ("offload.quality.command:PerplexityCommand", "measure the perplexity of a text"),
    "check": (
        "offload.quality.command:CheckCommand",
        "compare a model with a reference: KL divergence, top-1 agreement, perplexity",
    ),
    "trace": ("offload.trace.command", "show, replay or draw a recorded run"),
}


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"offload: error: {shortened(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse like `ArgumentParser`, to which `--temp=--` would give an empty list."""
        for word in args or ():
            if re.fullmatch(r"(--[\w-]+=|-\w+=?)--", word):
                self.error(f"{word} has no value: give one")
        return super().parse_known_args(args, namespace)


def build_parser(wanted: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """A parser that knows every command, and the options of those that are `wanted`."""
    parser = Parser(
        prog="offload",
        description="Run Mixture-of-Experts models whose experts do not fit into memory.",
    )
    parser.add_argument("--version", action="version", version=f"offload {__version__}")
    parser.set_defaults(command=None)
    actions = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (place, line) in COMMANDS.items():
        if name in wanted:
            command = pkgutil.resolve_name(place)
            added = add_command(actions, name, line, command.run, command.EXAMPLE)
            command.add_arguments(added)
        else:
            add_command(actions, name, line)
    return parser


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as `sys.exit` does, which restores the terminal.

    Signals can only be handled on the main thread; on any other, nothing changes.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in names):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                    undo.callback(signal.signal, number, signal.signal(number, _end))
        yield


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the program's arguments) names.

    Returns its exit code. Ctrl-C ends it at any time, the imports of the command included.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


@_ending_in_order()
def _run(argv: Sequence[str]) -> int:
    """`main`, without its handling of Ctrl-C. An error becomes one line on stderr."""
    from offload.files import check_streams, give_up_unwritable

    debug = makes_file = False
    try:
        check_streams()
        try:
            # No option of the program itself takes a value, so the first word is the command.
            wanted = [word for word in argv if not word.startswith("-")][:1]
            arguments = build_parser(wanted).parse_args(argv)
        finally:
            sys.stdout.flush()  # --help and --version leave from here
        if arguments.command is None:
            build_parser(()).print_help(sys.stderr)
            return USAGE
        debug = arguments.debug
        output = getattr(arguments, "output", None)
        makes_file = arguments.command == "quantize" or isinstance(output, Path)
        logging.basicConfig(format="offload: %(message)s", level=logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        result: int = arguments.run(arguments)
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        give_up_unwritable()
        return FAILED if makes_file else DONE
    except BaseException as error:
        # A library written in Rust panics with an exception that is no `Exception`.
        if not isinstance(error, Exception) and not is_memory(error):
            raise
        text = one_line(error)
        if isinstance(error, OSError) and sys.stdout in give_up_unwritable():
            text = f"cannot write to stdout: {error.strerror or error}"
        if debug:
            raise
        print(f"offload: error: {text}", file=sys.stderr)
        return FAILED
