"""`offload bench`: llama-bench's tests with one or several settings."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import DONE
from offload.files import TIMELINE, check_output, check_readable
from offload.flags import (
    add_model,
    add_options,
    explained,
    option,
    options_from,
    options_of,
    parser_of,
)
from offload.options import LoadOptions, SharedOptions
from offload.pack.asked import begin_loading
from offload.pack.recipe import AskedBits
from offload.pictures import check_picture
from offload.quant.errors import OffloadError
from offload.units import count, listed, positive

if TYPE_CHECKING:
    from offload.bench.row import BenchRow

EXAMPLE = "offload bench demo --expert-slots 25%,50%,100% --plot speed.png"
SWEPT = ("expert_bits", "expert_slots", "policy", "lookahead")  # the last changes fastest
SWITCH = {"on": True, "off": False, "auto": None}


def pair(text: str) -> tuple[int, int]:
    """An argparse type: two positive numbers with a comma between them."""
    first, _, second = text.partition(",")
    return positive(first), positive(second)


def switch(text: str) -> bool | None:
    """An argparse type: on, off, or auto (None)."""
    if text not in SWITCH:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not on, off or auto")
    return SWITCH[text]


_lengths = partial(option, group="tests", unit="tokens", parse=listed(count), action="extend")
_test, _output = partial(option, group="tests"), partial(option, group="output")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `offload bench` alone; names and defaults are llama-bench's."""

    n_prompt: tuple[int, ...] = _lengths(
        "-p --n-prompt N,..", "prompt tokens to read; 0 leaves this test out", default=(512,)
    )
    n_gen: tuple[int, ...] = _lengths(
        "-n --n-gen N,..", "tokens to generate; 0 leaves this test out", default=(128,)
    )
    n_depth: tuple[int, ...] = _lengths(
        "-d --n-depth N,..", "tokens that are in the context before each test", default=(0,)
    )
    pg: tuple[tuple[int, int], ...] = _test(
        "-pg P,N",
        "also read P tokens and generate N in one test; may be given several times",
        default=(),
        unit="tokens",
        parse=pair,
        action="append",
    )
    repetitions: int = _test(
        "-r --repetitions N", "timed runs of each test", default=5, parse=positive
    )
    no_warmup: bool = _test(
        "--no-warmup", "leave out the untimed run before each test", default=False
    )
    random: bool = _test(
        "--random",
        "read random tokens, as llama-bench does, instead of English text",
        default=False,
    )
    output: str = _output(
        "-o --output", "format of the output", default="md", choices=("md", "csv", "json", "jsonl")
    )
    plot: Path | None = _output(
        "--plot PICTURE",
        "draw tokens/s and hit rate over the share of resident experts; the file ends in .png, "
        ".svg or .pdf",
    )
    compare: str | None = _output(
        "--compare FILE", "also show the ratio to an earlier run, whose -o json output is in FILE"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    once = {each.name for each in fields(LoadOptions)} - {*SWEPT, "warm_start"}
    add_options(parser, LoadOptions, once)
    sweeps = parser.add_argument_group(
        "sweeps", "Lists are separated by commas. The model is loaded for every combination."
    )
    _add_swept(sweeps)
    add_options(parser, LoadOptions, ["warm_start"], group="sweeps", warm_start=False)
    parser.add_argument_group("tests", "Lists are separated by commas.")
    add_options(parser, BenchOptions)
    add_options(parser, SharedOptions, ["timeline"])


def _add_swept(place: argparse._ArgumentGroup) -> None:
    """The options in `SWEPT`, each of which takes a list here."""
    for each, spelling in options_of(LoadOptions):
        if each.name not in SWEPT:
            continue
        (flag,) = spelling.flags
        settings: dict[str, Any] = {
            "dest": each.name,
            "default": argparse.SUPPRESS,
            "help": explained(each, each.default).replace("%", "%%"),
            "type": listed(parser_of(each)),
            "metavar": f"{spelling.metavar},..",
        }
        if each.name == "lookahead":  # a switch: the flag alone is on, --no-lookahead is off
            settings |= {"type": listed(switch), "metavar": ",".join(SWITCH)}
            settings |= {"nargs": "?", "const": [True]}
        place.add_argument(flag, **settings)
    place.add_argument(
        "--no-lookahead",
        dest="lookahead",
        default=argparse.SUPPRESS,
        action="store_const",
        const=[False],
        help="the same as --lookahead off",
    )


def combinations(arguments: argparse.Namespace) -> list[LoadOptions]:
    """Options for every combination of the lists that were given for `SWEPT`.

    Raises `OffloadError` if one of them could not be loaded.
    """
    given = vars(arguments)
    single = {name: value for name, value in given.items() if name not in SWEPT}
    base = options_from(argparse.Namespace(**single), LoadOptions)
    lists = [given.get(name, [getattr(base, name)]) for name in SWEPT]
    return [
        replace(base, **dict(zip(SWEPT, one, strict=True))) for one in itertools.product(*lists)
    ]


def run(arguments: argparse.Namespace) -> int:
    """Measure and write rows. If the command is interrupted, the finished rows remain."""
    asked, shared = options_from(arguments, BenchOptions), options_from(arguments, SharedOptions)
    settings = combinations(arguments)
    check_picture(asked.plot, "--plot")
    check_output(shared.timeline, TIMELINE)
    if not (any(asked.n_prompt) or any(asked.n_gen) or asked.pg):
        raise OffloadError("there is nothing to measure: give -p, -n or -pg a number above 0")
    for setting in settings:
        AskedBits.of(setting)  # raises for wrong bits before anything is measured
    for flag, file in (("trace", settings[0].trace), ("timeline", shared.timeline)):
        if len(settings) > 1 and file:
            raise OffloadError(
                f"--{flag} records one run, and a sweep has several: give each option one value"
            )
    check_readable(asked.compare)
    begin_loading(arguments.model, settings[0])
    from offload.bench.compare import read_earlier
    from offload.bench.output import WRITERS, save_picture, write_tables
    from offload.bench.row import make_tests
    from offload.bench.run import check_context, sweep

    tests = make_tests(asked.n_prompt, asked.n_gen, asked.pg, asked.n_depth)
    check_context(tests, settings[0].context)
    earlier = read_earlier(asked.compare) if asked.compare else None
    rows: list[BenchRow] = []

    def measured() -> Iterator[BenchRow]:
        for row in sweep(
            arguments.model,
            settings,
            tests,
            timeline=shared.timeline,
            repetitions=asked.repetitions,
            warmup=not asked.no_warmup,
            random=asked.random,
        ):
            rows.append(row)
            yield row
            if earlier is not None and (reason := earlier.why_none(row)):
                print(f"--compare: {reason}", file=sys.stderr)

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    tables = partial(write_tables, tests=tests, settings=settings, columns=columns)
    try:
        WRITERS.get(asked.output, tables)(measured(), sys.stdout, earlier)
    finally:
        if asked.plot and rows:
            save_picture(rows, asked.plot)
    return DONE
