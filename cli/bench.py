"""`offload bench`: llama-bench's tests as a table or JSON.

Knows: its flags, columns and formats. Does not know: how a test is run (`offload.bench`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_model_flags, add_timeline
from cli.model import load_model
from cli.values import count, pair, positive
from offload.errors import OffloadError
from offload.version import __version__

if TYPE_CHECKING:
    from offload.bench import Result

COLUMNS = "model size params backend test t/s slots resident_% hit_% MiB/token link_%"


def add(commands: Commands) -> None:
    """The command and its flags."""
    bench = commands.add(
        "bench", run, "measure tokens/second", "offload bench demo -p 512 -n 128 -r 5"
    )
    add_model_flags(bench)
    bench.add_argument(
        "-p", "--n-prompt", type=count, default=512, metavar="N", help="prefill tokens (512)"
    )
    bench.add_argument(
        "-n", "--n-gen", type=count, default=128, metavar="N", help="decoded tokens (128)"
    )
    bench.add_argument(
        "-pg", type=pair, metavar="P,N", help="also prefill P and decode N in one test"
    )
    bench.add_argument(
        "-d", "--n-depth", type=count, default=0, metavar="N", help="tokens before the test"
    )
    bench.add_argument(
        "-r", "--repetitions", type=positive, default=5, metavar="N", help="of each test (5)"
    )
    bench.add_argument("-o", "--output", choices=("md", "json"), default="md", help="format (md)")
    bench.add_argument("--no-warmup", action="store_true", help="time the first run too")
    bench.add_argument(
        "--random", action="store_true", help="random tokens, as llama-bench, not real text"
    )
    add_timeline(bench)


def run(arguments: argparse.Namespace) -> int:
    model, tokenizer, _ = load_model(arguments)
    from offload.bench import Test
    from offload.bench import run as run_tests
    from offload.handle import offload_of
    from offload.report import bits_name
    from offload.timeline import recording

    depth = arguments.n_depth
    tests = [Test(arguments.n_prompt, 0, depth)] if arguments.n_prompt else []
    tests += [Test(0, arguments.n_gen, depth)] if arguments.n_gen else []
    tests += [Test(arguments.pg[0], arguments.pg[1], depth)] if arguments.pg else []
    if not tests:
        raise OffloadError("there is nothing to measure: -p, -n and -pg are all 0")
    offload = offload_of(model)
    common = {
        "build": __version__,
        "cpu": platform.processor() or platform.machine(),
        "backend": offload.options.device.type.upper(),
        "model": offload.pack.info.source,
        "model_type": model.config.model_type,
        "model_size": offload.pack.total_bytes,
        "model_n_params": offload.pack.parameters,
        "bits": bits_name(offload.pack.info),
        "policy": offload.options.policy,
        "lookahead": offload.options.lookahead,
        "text": "random" if arguments.random else "real",
    }
    results = run_tests(
        model,
        tokenizer,
        tests,
        repetitions=arguments.repetitions,
        warmup=not arguments.no_warmup,
        random=arguments.random,
    )
    with contextlib.closing(offload), recording(model, arguments.timeline):
        if arguments.output == "json":
            print(json.dumps([{**common, **result.to_json()} for result in results], indent=2))
        else:
            _print_table(common, results)
    return DONE


def _print_table(common: dict[str, Any], results: Iterator[Result]) -> None:
    names = [name.replace("_", " ") for name in COLUMNS.split()]
    print(f"| {' | '.join(names)} |")
    print(f"| {' | '.join('---' if i in (0, 3) else '---:' for i in range(len(names)))} |")
    for result in results:
        print(f"| {' | '.join(_row(common, result))} |", flush=True)


def _row(common: dict[str, Any], result: Result) -> list[str]:
    experts = result.experts
    return [
        f"{common['model']} {common['bits']}",
        f"{common['model_size'] / 2**30:.2f} GiB",
        f"{common['model_n_params'] / 1e9:.2f} B",
        common["backend"],
        result.test.name,
        f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}",
        str(experts.slots),
        f"{experts.slots / experts.total_experts:.0%}",
        f"{experts.counts.hit_rate:.1%}",
        f"{experts.mib_per_token:.1f}",
        f"{result.link_share:.0%}",
    ]
