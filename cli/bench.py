"""`offload bench`: llama-bench's tests over one or several settings.

Knows: what its flags (`bench_flags`) ask for, where rows are written. Does not know: how a test is
run or a row is shown (`offload.benching`).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from offload.quant.errors import OffloadError

from cli.bench_flags import add_bench_flags
from cli.commands import Commands
from cli.exit_codes import DONE
from cli.model import load_model

if TYPE_CHECKING:
    from offload.bench.output import Earlier, Printer
    from offload.bench.run import Loaded, Row, Setting
    from offload.bench.sample import Test

PROMPT, GENERATED, DEPTH = [512], [128], [0]


def add(commands: Commands) -> None:
    """The command and its flags."""
    bench = commands.add(
        "bench",
        run,
        "measure tokens/second",
        "offload bench demo -p 512 -n 128 --expert-slots 25%,50%,100% --plot speed.png",
    )
    add_bench_flags(bench)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write rows; those that are complete stand when it is interrupted."""
    from offload.bench.output import ended, read_earlier
    from offload.bench.picture import check_picture, save_picture
    from offload.bench.run import check_context, make_settings, sweep
    from offload.bench.sample import make_tests

    tests = make_tests(
        arguments.n_prompt or PROMPT,
        arguments.n_gen or GENERATED,
        arguments.pg,
        arguments.n_depth or DEPTH,
    )
    if not tests:
        raise OffloadError("there is nothing to measure: -p, -n and -pg are all 0")
    check_context(tests, arguments.ctx_size)
    settings = make_settings(
        arguments.expert_bits, arguments.expert_slots, arguments.policy, arguments.lookahead
    )
    for flag in ("trace", "timeline"):
        if len(settings) > 1 and getattr(arguments, flag):
            raise OffloadError(f"--{flag} records one run and a sweep has many: name one setting")
    earlier = read_earlier(arguments.compare) if arguments.compare else None
    if arguments.plot:
        check_picture(arguments.plot)

    @contextlib.contextmanager
    def load(setting: Setting) -> Iterator[Loaded]:
        from offload.engine.handle import offload_of
        from offload.trace.timeline import recording

        chosen = argparse.Namespace(**{**vars(arguments), **asdict(setting)})
        model, tokenizer, _ = load_model(chosen, note=setting is settings[0])
        with contextlib.closing(offload_of(model)), recording(model, arguments.timeline):
            yield model, tokenizer

    rows: list[Row] = []
    try:
        with ended(_printer(arguments.output, tests, settings, earlier)) as printer:
            for row in sweep(
                load,
                settings,
                tests,
                repetitions=arguments.repetitions,
                warmup=not arguments.no_warmup,
                random=arguments.random,
            ):
                rows.append(row)
                printer.row(row)
                if earlier is not None and (reason := earlier.why_none(row)):
                    print(f"--compare: {reason}", file=sys.stderr)
    finally:
        if arguments.plot and rows:
            save_picture(rows, arguments.plot)
    return DONE


def _printer(
    output: str, tests: Sequence[Test], settings: Sequence[Setting], earlier: Earlier | None
) -> Printer:
    from offload.bench.output import CsvPrinter, JsonlPrinter, JsonPrinter, TablePrinter

    if output == "md":
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return TablePrinter(sys.stdout, tests, settings, columns=columns, earlier=earlier)
    if output == "csv":
        return CsvPrinter(sys.stdout, earlier)
    return (JsonPrinter if output == "json" else JsonlPrinter)(sys.stdout, earlier)
