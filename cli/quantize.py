"""`offload quantize`: a pack in a folder of one's own.

Knows: its flags. Does not know: how a pack is made (`offload.packs`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offload.quant.errors import OffloadError

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_budget_flags, add_recipe_flags, add_source_flags
from offload.files import user_path


def add(commands: Commands) -> None:
    """The command and its flags."""
    quantize = commands.add(
        "quantize", run, "make a pack", "offload quantize demo ./demo-q4 --bits q4"
    )
    quantize.add_argument(
        "model", metavar="SRC", help="checkpoint folder, .gguf file, hub id, or demo"
    )
    quantize.add_argument("destination", metavar="DST", type=Path, help="folder of the pack, new")
    add_recipe_flags(quantize)
    add_budget_flags(quantize.add_argument_group("what --bits fit must fit in"))
    add_source_flags(quantize)


def run(arguments: argparse.Namespace) -> int:
    from offload.budget.resolve import Planner, find_place
    from offload.chat.report import pack_line
    from offload.pack.find import find_or_make_pack
    from offload.pack.recipe import AskedBits

    destination = user_path(arguments.destination)
    if destination.name in ("", ".."):
        raise OffloadError(f"DST is {destination}: give the name of a new folder")
    asked = AskedBits(
        arguments.bits, arguments.expert_bits, arguments.dense_bits, arguments.group_size
    )
    place = find_place(arguments.device, arguments.gpus, arguments.vram, arguments.ram)
    plan = Planner(
        place.device,
        place.memory,
        context=arguments.ctx_size,
        ubatch=arguments.ubatch_size,
        cards=place.cards,
    )
    path = find_or_make_pack(
        arguments.model,
        asked.recipe(),
        device=place.device,
        plan=plan if asked.fit else None,
        destination=destination,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(pack_line(path), file=sys.stderr)
    print(path)
    return DONE
