"""`offload bench`: llama-bench's tests over one or several settings."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from offload.options import (
    DONE,
    BenchOptions,
    LoadOptions,
    ThreadOptions,
    TimelineOptions,
    add_model,
    add_options,
    combinations,
    names_of,
    options_from,
)
from offload.quant.errors import OffloadError

if TYPE_CHECKING:
    from offload.bench.output import Earlier, Printer
    from offload.bench.run import Loaded, Row
    from offload.bench.sample import Test

EXAMPLE = "offload bench demo -p 512 -n 128 --expert-slots 25%,50%,100% --plot speed.png"
SWEPT = ("expert_bits", "expert_slots", "policy", "lookahead")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    once = [name for name in names_of(LoadOptions) if name not in (*SWEPT, "warm_start")]
    add_options(parser, LoadOptions, once)
    add_options(parser, ThreadOptions)
    parser.add_argument_group(
        "sweeps", "lists have commas between; the model is loaded for every combination"
    )
    add_options(parser, LoadOptions, SWEPT, group="sweeps", several=True)
    add_options(parser, LoadOptions, ["warm_start"], group="sweeps", warm_start=False)
    parser.add_argument_group("tests", "lists have commas between")
    add_options(parser, BenchOptions)
    add_options(parser, TimelineOptions)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write rows. When the command is interrupted, the rows that are complete stay."""
    from offload.bench.output import ended, read_earlier
    from offload.bench.picture import check_picture, save_picture
    from offload.bench.run import check_context, sweep
    from offload.bench.sample import make_tests

    asked = options_from(arguments, BenchOptions)
    tests = make_tests(asked.n_prompt, asked.n_gen, asked.pg, asked.n_depth)
    if not tests:
        raise OffloadError("there is nothing to measure: -p, -n and -pg are all 0")
    settings = combinations(arguments, SWEPT)
    check_context(tests, settings[0].context)
    timeline = options_from(arguments, TimelineOptions).timeline
    for flag, file in (("trace", settings[0].trace), ("timeline", timeline)):
        if len(settings) > 1 and file:
            raise OffloadError(f"--{flag} records one run and a sweep has many: name one setting")
    earlier = read_earlier(asked.compare) if asked.compare else None
    if asked.plot:
        check_picture(asked.plot)
    threads = options_from(arguments, ThreadOptions).threads

    @contextlib.contextmanager
    def load(setting: LoadOptions) -> Iterator[Loaded]:
        from offload.engine.handle import offload_of
        from offload.loading import load_and_tell
        from offload.trace.timeline import recording

        first = setting is settings[0]
        model, tokenizer, _ = load_and_tell(arguments.model, setting, threads, note=first)
        with contextlib.closing(offload_of(model)), recording(model, timeline):
            yield model, tokenizer

    rows: list[Row] = []
    try:
        with ended(_printer(asked.output, tests, settings, earlier)) as printer:
            for row in sweep(
                load,
                settings,
                tests,
                repetitions=asked.repetitions,
                warmup=not asked.no_warmup,
                random=asked.random,
            ):
                rows.append(row)
                printer.row(row)
                if earlier is not None and (reason := earlier.why_none(row)):
                    print(f"--compare: {reason}", file=sys.stderr)
    finally:
        if asked.plot and rows:
            save_picture(rows, asked.plot)
    return DONE


def _printer(
    output: str, tests: Sequence[Test], settings: Sequence[LoadOptions], earlier: Earlier | None
) -> Printer:
    from offload.bench.output import CsvPrinter, JsonlPrinter, JsonPrinter, TablePrinter

    if output == "md":
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return TablePrinter(sys.stdout, tests, settings, columns=columns, earlier=earlier)
    if output == "csv":
        return CsvPrinter(sys.stdout, earlier)
    return (JsonPrinter if output == "json" else JsonlPrinter)(sys.stdout, earlier)
