"""`offload doctor`: what this machine has, what is slow, what to do about it.

Knows: columns and JSON. Does not know: what is looked at (`offload.doctor`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.commands import Commands
from cli.exit_codes import DONE

if TYPE_CHECKING:
    from offload.machine.finding import Finding

COLOURS = {"ok": "32", "slow": "33", "missing": "31"}  # green, yellow, red
NAME = 17  # columns


def add(commands: Commands) -> None:
    """The command and its flags."""
    doctor = commands.add(
        "doctor", run, "look at this machine: versions, rates, what to mend", "offload doctor"
    )
    doctor.add_argument("--json", action="store_true", help="write JSON, for bug reports")


def run(arguments: argparse.Namespace) -> int:
    from offload.machine.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not arguments.json:
            print("\n".join(lines(finding)), flush=True)
    if arguments.json:
        print(json.dumps([f.to_json() for f in findings], indent=2, ensure_ascii=False))
        return DONE
    amiss = sum(finding.verdict != "ok" for finding in findings)
    told = {0: "nothing is amiss", 1: "1 thing to look at"}
    print(f"\n{told.get(amiss, f'{amiss} things to look at')}")
    return DONE


def lines(finding: Finding) -> Iterator[str]:
    """A finding, and its remedy below it."""
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    verdict = f"{finding.verdict:<8}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        verdict = f"\x1b[{COLOURS[finding.verdict]}m{verdict}\x1b[0m"
    margin = " " * (8 + NAME)
    value = textwrap.wrap(finding.value, width - len(margin)) or [""]
    yield f"{verdict}{finding.name:<{NAME}}{value[0]}"
    for more in value[1:]:
        yield margin + more
    if finding.remedy:
        yield from textwrap.wrap(
            f"-> {finding.remedy}",
            width,
            initial_indent=margin,
            subsequent_indent=f"{margin}   ",
        )
