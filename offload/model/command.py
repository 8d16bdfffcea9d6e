"""`offload pull`: fetches a model from the hub, if it would run on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass

from offload.errors import DONE, BudgetError, SourceError
from offload.files import existing, offload_home, short
from offload.flags import add_options, option, options_from
from offload.model.names import DEMO, SHAPE_FILES, FoundModel, fetch_weights, find, missing_bytes
from offload.options import HUB, LoadOptions
from offload.pack.asked import begin_loading
from offload.units import gib

EXAMPLE = "offload pull qwen3-30b-a3b"


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """Options of `offload pull` alone."""

    force: bool = option(
        "--force", "fetch a model that does not fit on this machine, too", default=False
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="short name like gpt-oss-20b (offload plan lists them), hub id, hub id:Q4_K_M or "
        "URL of a GGUF file",
    )
    add_options(parser, PullOptions)
    add_options(parser, LoadOptions, HUB)


def run(arguments: argparse.Namespace) -> int:
    """Plan, then fetch. Raises `BudgetError` for a model that does not fit."""
    options, name = options_from(arguments, LoadOptions), arguments.model
    if name == DEMO:
        print(short(find(name, options).folder))
        return DONE
    begin_loading(name, options, SHAPE_FILES)
    found = find(name, options, SHAPE_FILES)
    if found.repository is None:
        raise SourceError(f"{name} is on this machine already: offload chat {shlex.quote(name)}")
    print(
        _verdict(found, name, options, force=options_from(arguments, PullOptions).force),
        file=sys.stderr,
    )
    found = find(name, options)
    fetch_weights(found)
    print(f"{found.name} is here. Next: offload chat {shlex.quote(name)}", file=sys.stderr)
    print(found.folder)
    return DONE


def _verdict(found: FoundModel, name: str, options: LoadOptions, *, force: bool) -> str:
    """What will be fetched, and how the model would run here. Raises `BudgetError`."""
    import shutil

    from offload.budget.resolve import find_place
    from offload.plan.outline import outline
    from offload.plan.plan import make_plan
    from offload.plan.report import bits_text, speed_text
    from offload.plan.target import this_machine

    size = missing_bytes(found)
    download = f"{found.name}: {gib(size, 1) if size else 'nothing'} to fetch"
    plan = make_plan(outline(name, options), this_machine(find_place(options)), options)
    row = plan.chosen
    if row is None or row.forecast is None:
        why = f"fits with {plan.remedy}" if plan.remedy else plan.rows[-1].refusal
        if force or plan.remedy:
            return f"{download}; {why}"
        raise BudgetError(f"{found.name} does not fit on this machine, {why}; --force fetches it")
    free = shutil.disk_usage(existing(offload_home())).free
    room = "" if row.pack_bytes + (size or 0) <= free else f"; {gib(free, 1)} of disk are free"
    speed = f"about {speed_text(row.forecast.usual)} tok/s"
    return f"{download}; at {bits_text(row)} bits {speed}, pack of {gib(row.pack_bytes, 1)}{room}"
