"""`offload trace`: look at a recorded run.

Knows: its actions; the flags of show and replay. Does not know: traces (`offload.traces`).
"""

from __future__ import annotations

import argparse

from cli import trace_plot, trace_simulate
from cli.commands import Commands, Parser
from cli.exit_codes import DONE, USAGE
from cli.values import names, positive


def add(commands: Commands) -> None:
    """The command and its actions."""
    trace = commands.add("trace", _usage, "look at a recorded run", "offload trace show run.trace")
    trace.set_defaults(command=None)
    _add_actions(trace)


def _add_actions(parser: argparse.ArgumentParser) -> None:
    """`show`, `replay`, `simulate` and `plot`."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    show = commands.add_parser("show", help="its text, its routing, layer by layer")
    show.set_defaults(run=_show)
    replay = commands.add_parser(
        "replay",
        help="what other caches would have done",
        epilog="example: offload trace replay run.trace --policy lru,lfru --expert-slots 10%,25%",
    )
    replay.set_defaults(run=_replay)
    replay.add_argument(
        "--policy", type=names, default=[], metavar="NAMES", help="as for chat, or belady"
    )
    replay.add_argument("--allocation", type=names, default=["shared"], metavar="NAMES")
    replay.add_argument(
        "--expert-slots", type=names, default=[], metavar="N,..", help="numbers or shares"
    )
    replay.add_argument(
        "--lookahead",
        type=names,
        default=["live"],
        metavar="NAMES",
        help="none, live (as recorded), router, previous, transitions, union (live)",
    )
    replay.add_argument(
        "--layers-ahead", type=positive, default=1, metavar="N", help="1 to 3 layers (1)"
    )
    replay.add_argument("--per-layer", action="store_true", help="each layer's hits and guesses")
    for command in (show, replay):
        command.add_argument("trace", metavar="FILE", help="what --trace wrote, or synthetic:MODEL")
        command.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )
    trace_simulate.add(commands)
    trace_plot.add(commands)


def _usage(arguments: argparse.Namespace) -> int:
    return USAGE


def _show(arguments: argparse.Namespace) -> int:
    from offload.trace.show import show

    for line in show(arguments.trace):
        print(line)
    return DONE


def _replay(arguments: argparse.Namespace) -> int:
    from offload.trace.show import replays

    lines = replays(
        arguments.trace,
        arguments.policy,
        arguments.allocation,
        arguments.expert_slots,
        arguments.lookahead,
        arguments.layers_ahead,
        per_layer=arguments.per_layer,
    )
    for line in lines:
        print(line, flush=True)
    return DONE
