"""Runs many cases of a target, each of which can be repeated by its number.

python -m tests.fuzz.run [--cases N] [--target NAME] [--only CASE]
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from tests.fuzz.choices import Choices
from tests.fuzz.targets import ALLOWED, Target, Targets

SLOWEST = 5.0  # seconds of the processor that a case may take
ENDLESS = 60.0  # seconds after which a case is ended
LONGEST = 1500  # characters of a message
MOST_MEMORY = 2**28  # bytes that a case may ask the system for
MOST_KEPT = 2**26  # bytes that all cases of a target together may leave behind


class Endless(BaseException):
    """A case does not end. It is no `Exception`, so that no handler of errors catches it."""


def case(target: Target, data: bytes, inside: Path) -> str:
    """Run a case and return "fine" or the name of the error that refused it.

    Raises any error that is a bug.
    """
    begin = time.process_time()
    try:
        with _watched(inside), _ended(), _limited():
            target(Choices(data))
        return "fine"
    except ALLOWED as error:
        return _refusal(error)
    except Endless:
        raise AssertionError(f"did not end in {ENDLESS} s") from None
    finally:
        seconds = time.process_time() - begin
        assert seconds < SLOWEST, f"took {seconds:.1f} s"


def _refusal(error: BaseException) -> str:
    """The name of an error that is allowed. Raises `AssertionError` for one that is too long."""
    text = str(error)
    assert "\n" not in text, f"an error of several lines: {text!r}"
    assert len(text) < LONGEST, f"an error of {len(text)} characters"
    assert not _of_memory(error), f"took more than {MOST_MEMORY >> 20} MiB: {text}"
    return type(error).__name__


def _of_memory(error: BaseException | None) -> bool:
    """Whether an error was raised because memory ran out."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def _limited() -> Iterator[None]:
    """Let the system refuse this process more than `MOST_MEMORY` beyond what it has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _ended() -> Iterator[None]:
    """End a case that takes too long: Python code by an exception, other code with the process."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("cases are run by the main thread: signals end them")
    before = signal.signal(signal.SIGALRM, _end)
    faulthandler.dump_traceback_later(2 * ENDLESS, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, ENDLESS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise Endless


def bytes_of(name: str, number: int) -> bytes:
    """The bytes of case `number` of target `name`, which are the same on every machine."""
    return hashlib.shake_128(f"{name} {number}".encode()).digest(96)


OWN = (sys.prefix, sys.base_prefix, Path(__file__).parents[2], "/proc")
_allowed: list[Path] = []  # folders where files may be opened; empty while no case runs
_outside: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _allowed or not isinstance(arguments[0], str | bytes):
        return
    path = os.fsdecode(arguments[0])
    if "\0" in path:  # refused when it is opened
        return
    place = Path(os.path.realpath(path))  # without .. and links
    if not any(place.is_relative_to(folder) for folder in _allowed):
        _outside.append(path)


sys.addaudithook(_hook)


@contextmanager
def _watched(inside: Path) -> Iterator[None]:
    """Fail when a file is opened that is neither in `inside` nor one of Python's own."""
    _outside.clear()
    _allowed[:] = [Path(os.path.realpath(folder)) for folder in (inside, *OWN)]
    try:
        yield
    finally:
        _allowed.clear()
        assert not _outside, f"opened {_outside}"


def run(targets: Targets, name: str, cases: range) -> dict[str, int]:
    """Count the outcomes of `cases`. Raises `AssertionError` with the case that found a bug."""
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
    """The targets, with the input of a tiny Mixtral made in `folder`."""
    from offload.options import LoadOptions
    from offload.pack.find import find_or_make_pack
    from tests.conftest import make_tokenizer, save_with_tokenizer

    checkpoint = save_with_tokenizer("mixtral", folder / "made")
    pack = find_or_make_pack(str(checkpoint), LoadOptions(), destination=folder / "made-pack")
    return Targets(folder, pack, checkpoint, make_tokenizer())


def memory() -> int:
    """Bytes of RAM that this process has now."""
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--target")
    parser.add_argument("--only", type=int)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        names = [asked.target] if asked.target else list(targets.all())
        cases = range(asked.cases) if asked.only is None else range(asked.only, asked.only + 1)
        for name in names:
            begin, before = time.monotonic(), memory()
            counts = run(targets, name, cases)
            seconds, kept = time.monotonic() - begin, memory() - before
            print(
                f"{name:<20}{len(cases):>8} cases {seconds:>7.1f} s {kept / 2**20:>5.0f} MiB kept  "
                f"{counts}",
                flush=True,
            )
            assert kept < MOST_KEPT


if __name__ == "__main__":
    main()
