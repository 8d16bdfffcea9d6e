"""How a command is added.

Knows: what all of them have: help, an example, --debug, errors of usage in one line. Does not know:
any of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from cli.exit_codes import USAGE
from offload.lines import shortened

Run = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(
            USAGE,
            f"offload: error: {shortened(message)} ({self.prog} --help)\n",
        )


class Commands:
    """The commands of `parser`; which was given is its `command`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(command=None)
        self._actions = parser.add_subparsers(
            dest="command", metavar="COMMAND", parser_class=Parser
        )

    def add(self, name: str, run: Run, help_text: str, example: str) -> argparse.ArgumentParser:
        """A command; the caller adds its flags."""
        command = self._actions.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )
        return command
