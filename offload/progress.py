"""A progress bar on stderr: done, bytes written, rate, time left.

Knows: rich. Does not know: what is being counted. When stderr is not a terminal a line is written
at the beginning and one at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from transformers.utils import logging as transformers_logging


class _Written(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['nbytes'] / 2**20:.0f} MiB")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed or 0.0, task.fields["unit"]))


def _rate(speed: float, unit: str) -> str:
    return f"{speed / 1e6:.1f} M{'B' if unit == 'bytes' else ' ' + unit}/s"


class Progress:
    """Counts towards `total` units of `unit`."""

    def __init__(self, title: str, *, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            self._bar = Bar(
                *columns,
                _Written(),
                _Rate(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, unit=unit, nbytes=0)
        self._done = self._nbytes = 0

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        if self._bar:
            self._bar.start()
        else:
            print(
                f"{self._title}: {self._total / 1e6:.1f} M {self._unit}",
                file=sys.stderr,
                flush=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            share = self._done / self._total if self._total else 0
            print(
                f"{self._title}: interrupted at {share:.0%}; run the same again, it goes on there",
                file=sys.stderr,
            )
        if kind is None and self._done:
            seconds = time.perf_counter() - self._begin
            rate = _rate(self._done / seconds, self._unit)
            written = f"{self._nbytes / 2**20:.0f} MiB"
            print(f"{self._title}: done in {seconds:.1f} s, {rate}, {written}", file=sys.stderr)

    def advance(self, amount: int, nbytes: int) -> None:
        """`amount` more units are done, `nbytes` more bytes written."""
        self._done += amount
        self._nbytes += nbytes
        if self._bar:
            self._bar.update(self._task, advance=amount, nbytes=self._nbytes)


class Ticker:
    """Told how far something is, `(done, total)`: a line that is overwritten at a terminal, else
    one every `every` seconds."""

    def __init__(self, title: str, *, every: float = 10.0) -> None:
        self._title = title
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every

    def __enter__(self) -> Ticker:
        self._shown = time.perf_counter()
        self._first: tuple[float, int] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._first is None or done < self._first[1]:  # what came before was loading
            self._first, self._shown = (now, done), now
        if now - self._shown < self._every or done == self._first[1]:
            return
        self._shown = now
        rate = (done - self._first[1]) / (now - self._first[0])
        line = f"{self._title}: {done} of {total} tokens, {rate:.0f} t/s, "
        line += f"{(total - done) / rate:.0f} s left"
        begin, end = ("\r", "\033[K") if self._terminal else ("", "\n")
        print(begin + line, end=end, file=sys.stderr, flush=True)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
