"""`offload trace`: shows a recorded run, replays it with other caches, or draws it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from offload.errors import DONE, USAGE
from offload.flags import add_command, add_options, option, options_from
from offload.options import POLICIES, POLICY_HELP
from offload.units import listed

EXAMPLE = "offload trace show run.trace"


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Options of `offload trace replay`."""

    policy: tuple[str, ...] = option(
        "--policy NAMES",
        "which expert to evict: lru, lfru, lfu, or belady (the optimum, which knows the future)",
        default=(),
        unset="as recorded",
        parse=listed(str),
    )
    expert_slots: tuple[str, ...] = option(
        "--expert-slots N,..",
        "how many experts are resident: numbers, or shares like 25%",
        default=(),
        unset="as recorded",
        parse=listed(str),
    )
    lookahead: tuple[str, ...] = option(
        "--lookahead NAMES",
        "which experts are loaded early: none, those of the recorded run (live), or those that the "
        "next layer's router would choose (router)",
        default=("live",),
        parse=listed(str),
    )
    per_layer: bool = option(
        "--per-layer", "show the hits and guesses of each layer", default=False
    )


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of `offload trace plot`."""

    expert_slots: str = option(
        "--expert-slots N",
        "how many experts are resident: a number or a share",
        default="25%",
        unit="experts",
    )
    policy: str = option("--policy NAME", POLICY_HELP, default=POLICIES[0])
    output: Path | None = option(
        "-o --output PICTURE",
        "draw to a file that ends in .png, .svg or .pdf",
        unset="the terminal",
    )


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
    from offload.trace.show import plot

    asked = options_from(arguments, PlotOptions)
    drawn = plot(arguments.trace, asked.expert_slots, asked.policy, asked.output)
    if drawn:
        print(drawn)
    return DONE


# Name -> its function, one line of help, the rest of an example, and its options.
ACTIONS = {
    "show": (_show, "show how the experts of each layer were used", "run.trace", None),
    "replay": (
        _replay,
        "replay a run with other policies, expert slots or look-ahead",
        "run.trace --policy lru,lfru --expert-slots 25%",
        ReplayOptions,
    ),
    "plot": (
        _plot,
        "draw residents, hits and misses of each layer's experts",
        "chat.trace --expert-slots 25% -o experts.png",
        PlotOptions,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(print_help=parser.print_help)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    for name, (run_action, line, words, options) in ACTIONS.items():
        action = add_command(actions, name, line, run_action, f"offload trace {name} {words}")
        action.add_argument(
            "trace", metavar="FILE", help="a file that --trace recorded, or synthetic:MODEL"
        )
        if options is not None:
            add_options(action, options)


def run(arguments: argparse.Namespace) -> int:
    """Show the help, because no action was named."""
    arguments.print_help(sys.stderr)
    return USAGE
