"""Shows how far long work has come: a bar at a terminal, a line that changes in a notebook, and
lines on stderr elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text


class _Written(ProgressColumn):
    """A column that shows mebibytes written, and millions of units a second."""

    def render(self, task: Task) -> Text:
        rate = _rate(task.speed or 0.0, task.fields["unit"])
        return Text(f"{task.fields['nbytes'] / 2**20:.0f} MiB {rate}")


def _rate(speed: float, unit: str) -> str:
    return f"{speed / 1e6:.1f} M{'B' if unit == 'bytes' else ' ' + unit}/s"


def _bar(*columns: ProgressColumn) -> Bar | None:
    """A bar that vanishes when the work ends; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        return None
    return Bar(*columns, console=Console(stderr=True), transient=True)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _display() -> Callable[[str], None] | None:
    """What replaces one line below a cell of a notebook; None elsewhere."""
    if not Console().is_jupyter:
        return None
    from IPython.display import display  # a notebook has it

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda line: handle.update({"text/plain": line}, raw=True)


class Progress:
    """Counts towards `total` units of `unit`, and says at the end how long they took."""

    def __init__(self, title: str, *, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._bar = _bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            _Written(),
            TimeRemainingColumn(),
        )
        self._done = self._nbytes = 0
        self._replace = None if self._bar else _display()
        self._every = 0.5 if self._replace else 10.0  # seconds between lines

    def __enter__(self) -> Progress:
        self._begin = self._shown = time.perf_counter()
        if self._bar:
            self._task = self._bar.add_task(
                self._title, total=self._total, unit=self._unit, nbytes=0
            )
            self._bar.start()
        else:
            self._show(f"{self._total / 1e6:.1f} M {self._unit}")
        return self

    def _show(self, state: str) -> None:
        (self._replace or _print)(f"{self._title}: {state}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            share = self._done / self._total if self._total else 0
            self._show(f"interrupted at {share:.0%}; run it again to continue from there")
        if kind is None and self._done:
            seconds = time.perf_counter() - self._begin
            rate = _rate(self._done / seconds, self._unit)
            self._show(f"done in {seconds:.1f} s, {rate}, {self._nbytes / 2**20:.0f} MiB")

    def advance(self, amount: int, nbytes: int) -> None:
        """Count `amount` more units as done, and `nbytes` more bytes as written."""
        self._done += amount
        self._nbytes += nbytes
        if self._bar:
            self._bar.update(self._task, advance=amount, nbytes=self._nbytes)
        elif self._done and (now := time.perf_counter()) - self._shown >= self._every:
            self._shown, speed = now, self._done / (now - self._begin)
            left = (self._total - self._done) / speed
            self._show(
                f"{self._done / self._total:.0%}, {self._nbytes / 2**20:.0f} MiB, "
                f"{_rate(speed, self._unit)}, {left:.0f} s left"
            )


class Ticker:
    """Shows tokens done, their rate and the time left whenever it is called with `(done, total)`.

    Where stderr is not a terminal it prints a line every `every` seconds.
    """

    def __init__(self, title: str, *, every: float = 10.0) -> None:
        self._title, self._every = title, every
        self._bar = _bar(TextColumn("{task.description}", markup=False))

    def __enter__(self) -> Ticker:
        self._shown = time.perf_counter()
        self._first: tuple[float, int] | None = None
        if self._bar:
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._first is None or done < self._first[1]:  # the time before was spent on loading
            self._first, self._shown = (now, done), now
        if done > self._first[1]:
            rate = (done - self._first[1]) / (now - self._first[0])
            left = f"{(total - done) / rate:.0f} s left"
            self.show(f"{done} of {total} tokens, {rate:.0f} t/s, {left}")

    def show(self, state: str) -> None:
        """Show how far the work is in the caller's words."""
        now = time.perf_counter()
        if self._bar:
            self._bar.update(self._task, description=f"{self._title}: {state}")
        elif now - self._shown >= self._every:
            self._shown = now
            _print(f"{self._title}: {state}")


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' own progress bars."""
    from transformers.utils import logging as transformers_logging  # other bars do not need it

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
