"""`offload quantize`: makes a pack in a folder that the user names."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from offload.errors import DONE
from offload.files import user_path
from offload.flags import add_options, options_from
from offload.options import BITS, BUDGET, HUB, LoadOptions
from offload.quant.errors import OffloadError
from offload.units import gib

EXAMPLE = "offload quantize demo ./demo-q4 --bits q4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="SRC", help="checkpoint folder, .gguf file, hub id, or demo"
    )
    parser.add_argument("destination", metavar="DST", type=Path, help="new folder for the pack")
    add_options(parser, LoadOptions, BITS)
    add_options(parser, LoadOptions, BUDGET, group="memory that --bits fit chooses for")
    add_options(parser, LoadOptions, HUB)


def run(arguments: argparse.Namespace) -> int:
    """Make the pack and write its path."""
    from offload.budget.resolve import Resolver, find_place
    from offload.pack.find import find_or_make_pack
    from offload.pack.recipe import AskedBits

    destination = user_path(arguments.destination)
    if destination.name in ("", ".."):
        raise OffloadError(f"DST is {destination}: give the name of a new folder")
    options = options_from(arguments, LoadOptions)
    asked, place = AskedBits.of(options), find_place(options)
    path = find_or_make_pack(
        arguments.model,
        options,
        destination=destination,
        device=place.device,
        resolver=Resolver(options, place) if asked.fit else None,
    )
    print(_summary(path), file=sys.stderr)
    print(path)
    return DONE


def _summary(path: Path) -> str:
    """One line about a new pack: its size, its bits, and the command that opens it."""
    from offload.pack.recipe import bits_name
    from offload.quant.pack import Pack

    with contextlib.closing(Pack(path)) as pack:
        weight = pack.total_bytes * 8 / pack.info.parameters
        how = f"{weight:.1f} bits a weight, {bits_name(pack.info)}"
        return f"{gib(pack.total_bytes)} ({how}); go on with: offload chat {shlex.quote(str(path))}"
