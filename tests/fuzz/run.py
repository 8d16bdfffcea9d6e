"""Many cases of a target, each repeatable by its number.

    python -m tests.fuzz.run [--cases N] [--target NAME] [--only CASE] [--atheris]

With atheris (`pip install atheris`) its coverage chooses the bytes, for one target, until Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.choices import Choices
from tests.fuzz.targets import ALLOWED, Target, Targets

SLOWEST = 5.0  # seconds of the processor that a case may take
LONGEST = 1500  # characters of a message
MOST_MEMORY = 2**29  # bytes by which all cases together may raise this process's peak


def case(target: Target, data: bytes, inside: Path) -> str:
    """Run a case: "fine", or the name of the error that refused it. Raises whatever is a bug."""
    begin = time.process_time()
    try:
        with _watched(inside):
            target(Choices(data))
        return "fine"
    except ALLOWED as error:
        text = str(error)
        assert "\n" not in text, f"an error of several lines: {text!r}"
        assert len(text) < LONGEST, f"an error of {len(text)} characters"
        return type(error).__name__
    finally:
        seconds = time.process_time() - begin
        assert seconds < SLOWEST, f"took {seconds:.1f} s"


def bytes_of(name: str, number: int) -> bytes:
    """What decides case `number` of target `name`: the same on every machine."""
    return hashlib.shake_128(f"{name} {number}".encode()).digest(96)


_inside: Path | None = None  # where files may be opened; None: nobody looks
_outside: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or _inside is None or not isinstance(arguments[0], str | bytes):
        return
    path = (
        arguments[0].decode(errors="replace") if isinstance(arguments[0], bytes) else arguments[0]
    )
    own = (str(_inside), sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc/")
    if not path.startswith(own) and "\0" not in path:
        _outside.append(path)


sys.addaudithook(_hook)


@contextmanager
def _watched(inside: Path) -> Iterator[None]:
    """Fail when a file outside of `inside` (and Python's own) is opened."""
    global _inside
    _inside = inside
    _outside.clear()
    try:
        yield
    finally:
        _inside = None
        assert not _outside, f"opened {_outside}"


def run(targets: Targets, name: str, cases: range) -> dict[str, int]:
    """How often each outcome came. Raises `AssertionError` naming the case that found a bug."""
    target, counts = targets.all()[name], dict[str, int]()
    for number in cases:
        try:
            outcome = case(target, bytes_of(name, number), targets.folder)
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__}: {error}\nagain: python -m tests.fuzz.run --target {name} "
                f"--only {number}"
            ) from error
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def make_targets(folder: Path) -> Targets:
    """Targets over a tiny Mixtral, made in `folder`."""
    from offload.packs import find_or_make_pack
    from offload.recipe import Recipe
    from tests.conftest import make_tokenizer, save_with_tokenizer

    checkpoint = save_with_tokenizer("mixtral", folder / "made")
    pack = find_or_make_pack(str(checkpoint), Recipe(), destination=folder / "made-pack")
    return Targets(folder, pack, checkpoint, make_tokenizer())


def peak_memory() -> int:
    """Most bytes this process ever had resident."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--target")
    parser.add_argument("--only", type=int)
    parser.add_argument("--atheris", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        names = [asked.target] if asked.target else list(targets.all())
        if asked.atheris:
            _with_atheris(targets, names[0])
            return
        cases = range(asked.cases) if asked.only is None else range(asked.only, asked.only + 1)
        before = peak_memory()
        for name in names:
            begin = time.monotonic()
            counts = run(targets, name, cases)
            seconds = time.monotonic() - begin
            print(f"{name:<20}{len(cases):>8} cases {seconds:>7.1f} s  {counts}", flush=True)
        grown = peak_memory() - before
        print(f"peak memory grew by {grown / 2**20:.0f} MiB")
        assert grown < MOST_MEMORY


def _with_atheris(targets: Targets, name: str) -> None:
    import atheris  # an optional tool: pip install atheris

    target = targets.all()[name]
    atheris.instrument_all()
    atheris.Setup([sys.argv[0]], lambda data: case(target, data, targets.folder) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
