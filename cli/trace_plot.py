"""`offload trace plot`: experts by layers as a picture.

Knows: its flags. Does not know: pictures (`offload.picture`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.commands import Parser
from cli.exit_codes import DONE
from cli.flags import add_trace_file


def add(actions: argparse._SubParsersAction[Parser]) -> None:
    """The action and its flags."""
    help_text = "experts by layers: resident, hits, misses"
    plot = actions.add_parser(
        "plot",
        help=help_text,
        description=help_text,
        epilog="example: offload trace plot chat.trace --expert-slots 25% -o experts.png",
    )
    plot.set_defaults(run=run)
    add_trace_file(plot, "recorded with --trace, or synthetic:MODEL")
    plot.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw to a file instead")


def run(arguments: argparse.Namespace) -> int:
    from offload.trace.picture import plot

    drawn = plot(
        arguments.trace,
        arguments.expert_slots,
        arguments.policy,
        arguments.allocation,
        arguments.output,
    )
    if drawn:
        print(drawn)
    return DONE
