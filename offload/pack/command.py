"""`offload quantize`, and what looks after packs and checkpoints: `list`, `show`, `rm`, `prune`."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offload.errors import DONE, FAILED
from offload.files import packs_folder, short, user_path
from offload.flags import add_model, add_options, option, options_from
from offload.lines import printable
from offload.options import BITS, BUDGET, HUB, LoadOptions
from offload.pack.asked import begin_loading
from offload.pack.recipe import AskedBits
from offload.quant.errors import OffloadError
from offload.units import gib

if TYPE_CHECKING:
    from offload.pack.at_hand import KeptCheckpoint, Removable
    from offload.pack.shelf import KeptPack

EXAMPLE = "offload quantize demo ./demo-q4 --bits q4"
WHOLE_ROWS = 10_000  # columns of a table that no terminal shows
FOLDED = 12  # characters in a line, at least, of a text that may take several lines


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
    destination = user_path(arguments.destination)
    if destination.name in ("", ".."):
        raise OffloadError(f"DST is {destination}: give the name of a new folder")
    options = options_from(arguments, LoadOptions)
    begin_loading(arguments.model, options)
    from offload.budget.resolve import Resolver, find_place
    from offload.pack.find import find_or_make_pack

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
        weight = pack.total_bytes * 8 / pack.parameters
        how = f"{weight:.1f} bits per weight, {bits_name(pack.info)}"
        return f"{gib(pack.total_bytes)} ({how}). Next: offload chat {shlex.quote(str(path))}"


@dataclass(frozen=True, kw_only=True)
class KeepingOptions:
    """Options of `offload list`, `show`, `rm` and `prune`; each command names those it takes."""

    output: str = option(
        "-o --output", "format of the output", default="text", choices=("text", "json")
    )
    yes: bool = option("-y --yes", "remove without asking", default=False)


class ListCommand:
    """`offload list`: the packs and checkpoints on this machine."""

    EXAMPLE = "offload list"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_options(parser, KeepingOptions, ["output"])
        add_options(parser, LoadOptions, ["pack_dir"])

    @staticmethod
    def run(arguments: argparse.Namespace) -> int:
        from offload.pack.at_hand import checkpoints
        from offload.pack.shelf import kept_packs

        folder = packs_folder(options_from(arguments, LoadOptions).pack_dir)
        packs = kept_packs(folder)
        here = checkpoints(packs)
        if options_from(arguments, KeepingOptions).output == "json":
            found = {
                "packs": [_pack_json(pack, here) for pack in packs],
                "checkpoints": [_checkpoint_json(each) for each in here],
            }
            print(json.dumps(found, indent=2, ensure_ascii=False))
            return DONE
        if packs:
            rows = [
                (
                    p.path.name,
                    p.bits_name.replace(",", ", "),
                    gib(p.size, 1),
                    _ago(p.last_used),
                    _made_from(p, here),
                )
                for p in packs
            ]
            print(f"Packs in {short(folder)} ({gib(sum(pack.size for pack in packs), 1)})")
            _print_table(("NAME", "BITS", "SIZE", "LAST USED", "MADE FROM"), rows)
        if here:
            rows = [
                (_called(c), c.bits_name, gib(c.size, 1), _ago(c.last_used), short(c.path))
                for c in here
            ]
            print("\n" * bool(packs) + f"Checkpoints ({gib(sum(each.size for each in here), 1)})")
            _print_table(("NAME", "BITS", "SIZE", "LAST USED", "WHERE"), rows)
        if not packs and not here:
            print("No models are on this machine yet. Try: offload chat demo", file=sys.stderr)
        return DONE


class ShowCommand:
    """`offload show`: what a model is made of."""

    EXAMPLE = "offload show demo"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_options(parser, KeepingOptions, ["output"])
        add_options(parser, LoadOptions, ("pack_dir", *HUB))

    @staticmethod
    def run(arguments: argparse.Namespace) -> int:
        from offload.pack.profile import profile

        told = profile(arguments.model, options_from(arguments, LoadOptions))
        if options_from(arguments, KeepingOptions).output == "json":
            print(json.dumps(told, indent=2, ensure_ascii=False))
            return DONE
        names = {name: "size" if name == "bytes" else name.replace("_", " ") for name in told}
        texts = {names[name]: _as_text(name, value) for name, value in told.items()}
        shown = [(name, text) for name, text in texts.items() if text]
        _print_table(None, shown)
        return DONE


class RemoveCommand:
    """`offload rm`: removes packs, and checkpoints that this program or the hub fetched."""

    EXAMPLE = "offload rm Mixtral-8x7B-Instruct-v0.1-q4"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "names",
            metavar="NAME",
            nargs="+",
            help="name that offload list shows, or path of a pack",
        )
        add_options(parser, KeepingOptions, ["yes"])
        add_options(parser, LoadOptions, ["pack_dir"])

    @staticmethod
    def run(arguments: argparse.Namespace) -> int:
        from offload.pack.at_hand import find_removable

        folder = packs_folder(options_from(arguments, LoadOptions).pack_dir)
        things = [find_removable(name, folder) for name in dict.fromkeys(arguments.names)]
        return _remove(things, options_from(arguments, KeepingOptions).yes)


class PruneCommand:
    """`offload prune`: removes what is left over."""

    EXAMPLE = "offload prune"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_options(parser, KeepingOptions, ["yes"])
        add_options(parser, LoadOptions, ["pack_dir"])

    @staticmethod
    def run(arguments: argparse.Namespace) -> int:
        from offload.pack.at_hand import find_leftovers

        folder = packs_folder(options_from(arguments, LoadOptions).pack_dir)
        things = list(find_leftovers(folder))
        if not things:
            print("Nothing to remove.")
            return DONE
        return _remove(things, options_from(arguments, KeepingOptions).yes)


def _remove(things: list[Removable], yes: bool) -> int:
    """Remove `things`, after a question unless `yes`, and tell what became free."""
    from offload.pack.at_hand import remove

    rows = [(each.name, _size(each.size), each.why) for each in things]
    _print_table(None, rows)
    if not yes:
        if not sys.stdin.isatty():
            raise OffloadError(
                "nothing was removed, because this is not a terminal to ask in: add --yes"
            )
        print(f"Remove {'this' if len(things) == 1 else 'these'}? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was removed.")
            return FAILED
    freed = 0
    for each in things:
        size = each.size
        remove(each)
        freed += size
    print(f"{_size(freed)} freed.")
    return DONE


def _print_table(head: tuple[str, ...] | None, rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows below each other, in the terminal's width; elsewhere each row is one line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=head is not None, header_style="bold")
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WHOLE_ROWS
    rows = [tuple(map(printable, row)) for row in rows]
    titles = head or ("",) * len(rows[0])
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    last = len(widths) - 1
    # The name comes first, because commands take it: these columns share what is left by others.
    folding = [at for at in range(last + 1) if at in (0, last) or titles[at] == "BITS"]
    least = {at: min(widths[at], FOLDED) for at in folding}
    spare = console.width - 2 * last - sum({**dict(enumerate(widths)), **least}.values())
    for at in folding:
        more = max(0, min(spare, widths[at] - least[at]))
        widths[at], spare = least[at] + more, spare - more
    for title, width in zip(titles, widths, strict=True):
        side: Literal["right", "left"] = "right" if title == "SIZE" else "left"
        table.add_column(title, justify=side, overflow="fold", width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _size(size: int) -> str:
    """A size, also one that is next to nothing."""
    return gib(size, 1) if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _ago(seconds: float) -> str:
    """A time, in seconds since 1970, as people tell it."""
    passed = time.time() - seconds
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (count := int(passed // size)) > 0:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def _called(checkpoint: KeptCheckpoint) -> str:
    """The name of a checkpoint; a user's own folder is shown by its path alone."""
    return checkpoint.name if checkpoint.removable else checkpoint.path.name


def _made_from(pack: KeptPack, here: list[KeptCheckpoint]) -> str:
    """Where the checkpoint of a pack is, and whether it is still there."""
    place = short(Path(pack.place)) if Path(pack.place).is_absolute() else pack.place
    return place if any(each.name == pack.place for each in here) else f"{place} (not here)"


def _pack_json(pack: KeptPack, here: list[KeptCheckpoint]) -> dict[str, Any]:
    return {
        "name": pack.path.name,
        "path": str(pack.path),
        "bits": pack.bits_name,
        "bytes": pack.size,
        "last_used": _iso(pack.last_used),
        "checkpoint": pack.place,
        "checkpoint_is_here": any(each.name == pack.place for each in here),
    }


def _checkpoint_json(checkpoint: KeptCheckpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "bits": checkpoint.bits_name,
        "bytes": checkpoint.size,
        "last_used": _iso(checkpoint.last_used),
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _as_text(name: str, value: Any) -> str:
    """A value of a profile as people read it; empty if there is none."""
    if name == "bytes":
        return gib(value, 1)
    if isinstance(value, dict):
        return ", ".join(f"{part} {bits}" for part, bits in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value or "")
