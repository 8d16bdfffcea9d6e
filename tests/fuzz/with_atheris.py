"""Runs one target with bytes chosen by coverage, until it finds a bug, Ctrl-C or the time is over.

    pip install atheris
    python -m tests.fuzz.with_atheris TARGET [--seconds N] [--seeds N]

Only this project's code is instrumented, so it must not be imported before. libFuzzer prints how
much was covered (cov), how many inputs found something new (corp) and the executions a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris  # an optional tool

OURS = ["offload", "cache", "quant"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=0, help="0: until Ctrl-C (0)")
    parser.add_argument("--seeds", type=int, default=200, help="inputs to begin with (200)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with atheris.instrument_imports(include=OURS):
            from tests.fuzz.run import bytes_of, case, make_targets

            targets = make_targets(Path(folder))
        target = targets.all()[asked.target]
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for number in range(asked.seeds):
            (seeds / str(number)).write_bytes(bytes_of(asked.target, number))

        def run(data: bytes) -> None:
            case(target, data, targets.folder)

        # Each case has its own alarm and its own limit of memory.
        ours = ["-handle_alrm=0", "-rss_limit_mb=0", "-max_len=96"]
        atheris.Setup([sys.argv[0], *ours, f"-max_total_time={asked.seconds}", str(seeds)], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
