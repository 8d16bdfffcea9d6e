"""Scripts with which a shell completes commands, options, their choices, and files."""

from __future__ import annotations

import argparse

import shtab

from offload.flags import path
from offload.options import ENGINES, POLICIES
from offload.pack.recipe import FIT, PRESETS

CHOICES = {
    "policy": POLICIES,
    "engine": ENGINES,
    "device": ("cpu", "cuda"),
    "bits": (*PRESETS, FIT),
}
FILES = ("model", "destination", "compare", "trace", "routing", "against")  # those of other types


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `shell`, made of the commands of `parser` and their options."""
    _complete(parser)
    return shtab.complete(parser, shell)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Say for each option of `parser` and of its commands what may follow it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete(command)
        elif action.type is path or action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in CHOICES and action.nargs != 0:
            action.choices = CHOICES[action.dest]
