"""Every command, in the order in which --help tells them.

Knows: which there are. Does not know: their flags.
"""

from __future__ import annotations

import argparse

from cli import bench, chat, check, doctor, generate, plan, ppl, quantize, trace
from cli.commands import Commands, Parser
from offload.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """Every command and flag."""
    parser = Parser(
        prog="offload", description="Run Mixture-of-Experts models whose experts do not fit."
    )
    parser.add_argument("--version", action="version", version=f"offload {__version__}")
    commands = Commands(parser)
    for command in (chat, generate, bench, plan, doctor, quantize, ppl, check, trace):
        command.add(commands)
    return parser
