"""The command line: which commands there are, and how each ends."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from offload.files import check_streams, give_up_unwritable
from offload.lines import is_memory, one_line, shortened
from offload.options import DONE, FAILED, INTERRUPTED, USAGE
from offload.version import __version__

# Name -> where it is, imported when it is called, and one line of help. Each place has EXAMPLE,
# add_arguments(parser) and run(arguments) -> exit code.
COMMANDS = {
    "chat": ("offload.chat.command", "talk to a model"),
    "generate": ("offload.generation.command", "answer one prompt on stdout"),
    "bench": ("offload.bench.command", "measure tokens/second"),
    "plan": (
        "offload.plan.command",
        "what fits, which bits, how fast: from config and index alone",
    ),
    "doctor": (
        "offload.machine.command",
        "look at this machine: versions, rates, what to mend",
    ),
    "quantize": ("offload.pack.command", "make a pack"),
    "ppl": ("offload.quality.command:Perplexity", "perplexity on a text"),
    "check": (
        "offload.quality.command:Check",
        "how far a model is from a reference: KL divergence, top-1 agreement, perplexity",
    ),
    "trace": ("offload.trace.command", "look at a recorded run"),
}


class Parser(argparse.ArgumentParser):
    """Tells errors of usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"offload: error: {shortened(message)} ({self.prog} --help)\n")


def build_parser(wanted: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """A parser that knows every command, and the options of those that are `wanted`."""
    parser = Parser(
        prog="offload", description="Run Mixture-of-Experts models whose experts do not fit."
    )
    parser.add_argument("--version", action="version", version=f"offload {__version__}")
    parser.set_defaults(command=None)
    actions = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (place, line) in COMMANDS.items():
        added = actions.add_parser(
            name,
            help=line,
            description=line,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in wanted:
            command = pkgutil.resolve_name(place)
            added.epilog = f"example: {command.EXAMPLE}"
            added.set_defaults(run=command.run)
            added.add_argument(
                "--debug", action="store_true", help="show a traceback when something fails"
            )
            command.add_arguments(added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with _ending_in_order():
        return _run(sys.argv[1:] if argv is None else argv)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as `sys.exit` does, which leaves a terminal as it was.

    Signals can be handled on the main thread only; elsewhere nothing changes.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []
    numbers = [getattr(signal, name) for name in names]
    before = [signal.signal(number, _end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _run(argv: Sequence[str]) -> int:
    debug = makes_file = False
    try:
        check_streams()
        try:
            # No option of the program itself takes a value: the first word is the command.
            wanted = [word for word in argv if not word.startswith("-")][:1]
            arguments = build_parser(wanted).parse_args(argv)
        finally:
            sys.stdout.flush()  # --help and --version leave from there
        if arguments.command is None:
            build_parser(()).print_help(sys.stderr)
            return USAGE
        debug = arguments.debug
        makes_file = arguments.command == "quantize" or isinstance(
            getattr(arguments, "output", None), Path
        )
        logging.basicConfig(format="offload: %(message)s", level=logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        result: int = arguments.run(arguments)
        sys.stdout.flush()
        return result
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader left, as `head` does
        give_up_unwritable()
        return FAILED if makes_file else DONE
    except Exception as error:
        text = one_line(error)
        if isinstance(error, OSError) and sys.stdout in give_up_unwritable():
            text = f"cannot write to stdout: {error.strerror or error}"
        if debug:
            raise
        print(f"offload: error: {text}", file=sys.stderr)
        return FAILED
    except BaseException as error:  # a panic of a library written in Rust is no `Exception`
        if debug or not is_memory(error):
            raise
        print(f"offload: error: {one_line(error)}", file=sys.stderr)
        return FAILED
