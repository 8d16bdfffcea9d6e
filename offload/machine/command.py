"""`offload doctor`: what this machine has, what is slow, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from offload.errors import DONE
from offload.flags import add_options, options_from
from offload.options import SharedOptions

if TYPE_CHECKING:
    from offload.machine.finding import Finding

EXAMPLE = "offload doctor"
COLOURS = {"ok": "32", "slow": "33", "missing": "31"}  # green, yellow, red
NAME = 17  # columns for a finding's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, SharedOptions, ["json"])


def run(arguments: argparse.Namespace) -> int:
    """Print every finding as soon as it is made, or all of them at the end as JSON."""
    from offload.machine.doctor import examine

    as_json = options_from(arguments, SharedOptions).json
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            print("\n".join(lines(finding)), flush=True)
    if as_json:
        print(json.dumps([f.to_json() for f in findings], indent=2, ensure_ascii=False))
        return DONE
    amiss = sum(finding.verdict != "ok" for finding in findings)
    told = {0: "everything is in order", 1: "1 warning"}
    print(f"\n{told.get(amiss, f'{amiss} warnings')}")
    return DONE


def lines(finding: Finding) -> Iterator[str]:
    """The lines of a finding, with its remedy below."""
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    verdict = f"{finding.verdict:<8}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        verdict = f"\x1b[{COLOURS[finding.verdict]}m{verdict}\x1b[0m"
    margin = " " * (8 + NAME)
    value = textwrap.fill(
        finding.value, width, initial_indent=margin, subsequent_indent=margin
    ).removeprefix(margin)
    yield f"{verdict}{finding.name:<{NAME}}{value}"
    if finding.remedy:
        yield from textwrap.wrap(
            f"-> {finding.remedy}",
            width,
            initial_indent=margin,
            subsequent_indent=f"{margin}   ",
        )
