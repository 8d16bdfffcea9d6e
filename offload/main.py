"""The program `offload`: which commands there are, and how each of them ends."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import pkgutil
import re
import signal
import sys
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from offload.errors import DONE, FAILED, INTERRUPTED, USAGE
from offload.flags import add_command
from offload.lines import did_you_mean, is_memory, one_line, shortened
from offload.quant.errors import OffloadError
from offload.version import __version__

# Name -> a module or class, imported when the command is called, and one line of help. Each module
# or class has EXAMPLE, add_arguments(parser) and run(arguments), which returns an exit code.
COMMANDS = {
    "chat": ("offload.chat.command", "talk to a model"),
    "generate": ("offload.generation.command", "answer a prompt, or a file of prompts"),
    "bench": ("offload.bench.command", "measure tokens per second"),
    "plan": ("offload.plan.command", "estimate fit and speed before downloading"),
    "pull": ("offload.model.command", "fetch a model from the hub, if it fits on this machine"),
    "doctor": (
        "offload.machine.command",
        "check this machine: what is slow and how to fix it",
    ),
    "quantize": ("offload.pack.command", "quantise a model into a folder (a pack) for later use"),
    "list": ("offload.pack.command:ListCommand", "list the models on this machine"),
    "show": ("offload.pack.command:ShowCommand", "show what a model is made of"),
    "rm": ("offload.pack.command:RemoveCommand", "remove a pack or a downloaded model"),
    "prune": (
        "offload.pack.command:PruneCommand",
        "remove unfinished and outdated packs",
    ),
    "ppl": ("offload.quality.command:PerplexityCommand", "measure the perplexity of a text"),
    "check": (
        "offload.quality.command:CheckCommand",
        "compare a model's predictions with a reference's",
    ),
    "trace": ("offload.trace.command", "show, replay or draw a recorded run"),
}


SHELLS = ("bash", "zsh", "fish")
WITH_MESSAGE = ("chat", "generate")  # what follows the model is the prompt, as with `ollama run`


class Parser(argparse.ArgumentParser):
    """A parser that takes no shortened flags and reports wrong usage in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    @property
    def commands(self) -> dict[str, Parser]:
        """The parsers of its commands, by their names."""
        found = [each for each in self._actions if isinstance(each, argparse._SubParsersAction)]
        return found[0].choices if found else {}

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"offload: error: {shortened(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse like `ArgumentParser`, to which `--temp=--` would give an empty list."""
        for word in args or ():
            if re.fullmatch(r"(--[\w-]+=|-\w+=?)--", word):
                self.error(f"{word} has no value: give one")
        return super().parse_known_args(args, namespace)


def build_parser(wanted: Container[str] = COMMANDS) -> Parser:
    """A parser that knows every command, and the options of those that are `wanted`."""
    parser = Parser(
        prog="offload",
        description="Run Mixture-of-Experts models larger than your GPU or RAM.",
        epilog="offload COMMAND --help shows a command's options. To begin: offload chat demo",
    )
    parser.add_argument("--version", action="version", version=f"offload {__version__}")
    parser.add_argument(
        "--completion", choices=SHELLS, help="print a script that completes commands and options"
    )
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command that `argv` names, with its options from flags, environment and config file.

    Words and flags of other programs are translated. Leaves with `USAGE` for those that do not
    exist here, and raises `OffloadError` for wrong values in the environment or in the file.
    """
    from offload.habits import translated

    words = _command_first(argv)
    parser = build_parser([word for word in words if not word.startswith("-")][:1])
    if not words or words[0].startswith("-"):
        only: argparse.Namespace = parser.parse_args(words)
        return only
    trail, rest = words[:1], words[1:]
    command = parser
    while trail[-1] in command.commands:
        command = command.commands[trail[-1]]
        if not (command.commands and rest and rest[0] in command.commands):
            break
        trail, rest = [*trail, rest[0]], rest[1:]
    try:
        rest = translated(rest, command._option_string_actions)
    except ValueError as error:
        command.error(str(error))
    arguments: argparse.Namespace
    arguments, extra = parser.parse_known_args([*trail, *rest])
    if extra and (words[0] not in WITH_MESSAGE or arguments.__dict__.get("prompt") is not None):
        quote = ", or quote a prompt" * (words[0] in WITH_MESSAGE)
        command.error(f"{' '.join(extra)!r} is one word too many: leave it out{quote}")
    if extra:
        arguments.prompt = " ".join(extra)
    if words[0] != "trace":  # a replay follows the recorded run, not the user's defaults
        from offload.config import fill_in

        fill_in(arguments, command)
    return arguments


def _command_first(argv: Sequence[str]) -> list[str]:
    """The words of `argv`, with the command's name as it is called here."""
    from offload.habits import OTHER_COMMANDS, SAME_COMMANDS

    first, *rest = argv or [""]
    if first == "help":
        return [*_command_first(rest), "--help"]
    if first == "version":
        return ["--version"]
    if not first or first.startswith("-") or first in COMMANDS:
        return list(argv)
    if first in SAME_COMMANDS:
        return [SAME_COMMANDS[first], *rest]
    if first in OTHER_COMMANDS:
        hint = f"offload {first}: {OTHER_COMMANDS[first]}"
    elif first == "demo" or Path(first).exists():
        hint = f"there is no command {first} (did you mean offload chat {first}?)"
    else:
        hint = f"there is no command {first}{did_you_mean(first, (*COMMANDS, *SAME_COMMANDS))}"
    Parser(prog="offload").error(hint)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as `sys.exit` does, which restores the terminal.

    Python drops an exception in a destructor. If it was a signal's, the signal comes again.
    Signals can only be handled on the main thread; on any other, nothing changes.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in names):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                    undo.callback(signal.signal, number, signal.signal(number, _end))
            undo.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = functools.partial(_send_again, sys.unraisablehook)
        yield


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _send_again(otherwise: Callable[[Any], object], dropped: Any) -> None:
    error = dropped.exc_value
    if isinstance(error, KeyboardInterrupt):
        number: int = signal.SIGINT
    elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        number = error.code - 128
    else:
        otherwise(dropped)
        return
    later = threading.Timer(0.01, signal.raise_signal, [number])  # by then the destructor is over
    later.daemon = True
    later.start()


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
    from offload.files import came_from_stdout, check_streams, give_up_unwritable

    debug = makes_file = False
    reworded, OffloadError.reworded = OffloadError.reworded, str
    try:
        check_streams()
        try:
            arguments = parse(argv)
        finally:
            sys.stdout.flush()  # --help and --version leave from here
        if arguments.completion:
            from offload.completion import script

            print(script(build_parser(), arguments.completion))
            return DONE
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
        if isinstance(error, OSError) and came_from_stdout(error):
            text = f"cannot write to stdout: {error.strerror or error}"
        if debug:
            raise
        print(f"offload: error: {text}", file=sys.stderr)
        return FAILED
    finally:
        OffloadError.reworded = reworded
