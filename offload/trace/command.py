"""`offload trace`: a recorded run as text, as a picture, and under other caches."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from offload.options import DONE, USAGE, PlotOptions, ReplayOptions, add_options, options_from

EXAMPLE = "offload trace show run.trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=None)
    actions = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], line: str, example: str
    ) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=line, description=line, epilog=f"example: {example}")
        action.set_defaults(run=run)
        action.add_argument(
            "trace", metavar="FILE", help="what --trace recorded, or synthetic:MODEL"
        )
        action.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )
        return action

    add("show", _show, "its text, its routing, layer by layer", "offload trace show run.trace")
    replay = add(
        "replay",
        _replay,
        "what other caches would have done",
        "offload trace replay run.trace --policy lru,lfru --expert-slots 10%,25%",
    )
    add_options(replay, ReplayOptions)
    plot = add(
        "plot",
        _plot,
        "experts by layers: resident, hits, misses",
        "offload trace plot chat.trace --expert-slots 25% -o experts.png",
    )
    add_options(plot, PlotOptions)


def run(arguments: argparse.Namespace) -> int:
    """No action was named."""
    return USAGE


def _show(arguments: argparse.Namespace) -> int:
    from offload.trace.show import show

    for line in show(arguments.trace):
        print(line)
    return DONE


def _replay(arguments: argparse.Namespace) -> int:
    from offload.trace.show import replays

    asked = options_from(arguments, ReplayOptions)
    for line in replays(
        arguments.trace,
        asked.policy,
        asked.expert_slots,
        asked.lookahead,
        per_layer=asked.per_layer,
    ):
        print(line, flush=True)
    return DONE


def _plot(arguments: argparse.Namespace) -> int:
    from offload.trace.picture import plot

    asked = options_from(arguments, PlotOptions)
    drawn = plot(arguments.trace, asked.expert_slots, asked.policy, asked.output)
    if drawn:
        print(drawn)
    return DONE
