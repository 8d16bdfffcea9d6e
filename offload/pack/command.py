"""`offload quantize`: makes a pack in a folder that the user names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offload.errors import DONE
from offload.files import user_path
from offload.flags import add_options, options_from
from offload.options import BITS, BUDGET, HUB, LoadOptions
from offload.quant.errors import OffloadError

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
    from offload.chat.report import pack_line
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
    print(pack_line(path), file=sys.stderr)
    print(path)
    return DONE
