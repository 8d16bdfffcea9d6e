"""`offload trace simulate`: a recorded run on a machine one may not have.

Knows: its flags. Does not know: the simulator (`offload.simulation`).
"""

from __future__ import annotations

import argparse

from cli.commands import Parser
from cli.exit_codes import DONE
from cli.flags import add_timeline, add_trace_file


def add(actions: argparse._SubParsersAction[Parser]) -> None:
    """The action and its flags."""
    help_text = "predict tokens/second on a machine"
    simulate = actions.add_parser(
        "simulate",
        help=help_text,
        description=help_text,
        epilog='example: offload trace simulate chat.trace --hardware "RTX 4090" '
        "--expert-slots 25%",
    )
    simulate.set_defaults(run=run)
    add_trace_file(simulate, "recorded with --trace, or synthetic:MODEL")
    simulate.add_argument(
        "--hardware",
        default="here",
        metavar="NAME",
        help="a card, like 3060, 4090, 2x4090, a100; here measures this machine (here)",
    )
    simulate.add_argument(
        "--software", default="host-planned", metavar="NAME", help="host-planned or device-planned"
    )
    simulate.add_argument(
        "--lookahead",
        default="router",
        metavar="NAME",
        help="none, live (as recorded), router, previous, transitions, union (router)",
    )
    simulate.add_argument(
        "--dense", metavar="SIZE", help="dense weights a token reads (what the trace says)"
    )
    simulate.add_argument(
        "--ram", metavar="SIZE", help="RAM for experts; the rest is on disk (all)"
    )
    add_timeline(simulate)


def run(arguments: argparse.Namespace) -> int:
    from offload.trace.simulate import Question, answer

    question = Question(
        arguments.trace,
        arguments.hardware,
        arguments.expert_slots,
        arguments.policy,
        arguments.allocation,
        arguments.software,
        arguments.lookahead,
        arguments.dense,
        arguments.ram,
        arguments.timeline,
    )
    print("\n".join(answer(question)))
    return DONE
