"""How many CPU threads to compute with while other programs use the cores, too.

OpenMP's threads wait for one another several hundred times for each token, and wait spinning. If
another program holds one of the cores, all threads wait for the one that has none, and spinning
takes from that one what is left. Fewer threads are then several times as fast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Self, TypeVar

import psutil
import torch

Step = TypeVar("Step")

LOOK_SECONDS = 0.25  # between two looks; a look takes 20 microseconds
LOWER_AFTER, RAISE_AFTER = 2, 8  # looks in a row that must agree before the number changes
SPARE = 0.5  # part of a core that others may use without one of our threads being given up


def wanted_threads(most: int, now: int, cores: int, others: float) -> int:
    """How many of `most` threads to use on `cores`, of which other programs use `others`.

    `now` are in use. Another one is added only if its core is nearly idle, so that the number does
    not swing.
    """
    fitting = int(cores - others + SPARE)
    if fitting > now:
        fitting = max(now, int(cores - others + SPARE / 2))
    return max(1, min(most, fitting))


class Threads:
    """How many threads torch uses while a model answers.

    `with threads:` uses as many as were right last, and `look` follows the load of the processor.
    Afterwards torch has as many as before.
    """

    def __init__(self) -> None:
        self.most = self.now = torch.get_num_threads()
        self._cores = psutil.cpu_count() or self.most
        self._agreeing = 0  # looks in a row that wanted fewer (below 0) or more threads
        self._looked = clocks()

    def __enter__(self) -> Self:
        torch.set_num_threads(self.now)
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.most)

    def during(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps, computed with as many threads as cores are free."""
        with self:
            for step in steps:
                yield step
                self.look()

    def look(self) -> None:
        """Follow the load, at most once in `LOOK_SECONDS`."""
        if time.monotonic() - self._looked[0] < LOOK_SECONDS:
            return
        before, self._looked = self._looked, clocks()
        seconds, busy, own = (now - then for now, then in zip(self._looked, before, strict=True))
        wanted = wanted_threads(self.most, self.now, self._cores, max(0.0, busy - own) / seconds)
        side = (wanted > self.now) - (wanted < self.now)
        self._agreeing = side + (self._agreeing if self._agreeing * side > 0 else 0)
        if -LOWER_AFTER < self._agreeing < RAISE_AFTER:
            return
        self.now, self._agreeing = wanted, 0
        torch.set_num_threads(wanted)


def clocks() -> tuple[float, float, float]:
    """Seconds: of the clock, of all busy cores (also those taken by other virtual machines), and of
    this process."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # also in user, nice
    return time.monotonic(), sum(times) - idle - twice, time.process_time()
