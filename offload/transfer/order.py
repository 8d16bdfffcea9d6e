"""In which order copies are given to a link that works off two queues.

Knows: jobs as integers, their bytes, who was asked for and who guessed. Does not know: streams,
events, tensors (`offload.cuda_transfer`).

A GPU's stream works in order, so one stream for both would let a demand wait behind every guess
before it. Two streams alone would let guesses take half the link from demands. Here a guess has
a stream of its own, begins on the device when the demands given before it are complete, without a
word from the host, and no more than `most` bytes of guesses are given at a time: that is what a
demand that comes later may have to share the link with.
"""

from __future__ import annotations

from typing import NamedTuple


class Begin(NamedTuple):
    """Give `job` to the link now: to the queue of demands or that of guesses."""

    job: int
    urgent: bool
    after: int | None  # a demand on the other queue that comes first


class CopyOrder:
    """Copies asked for and not yet complete."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._demands: dict[int, bool] = {}  # not begun, in order -> whether its bytes are there
        self._guesses: dict[int, bool] = {}
        self._sizes: dict[int, int] = {}  # of all
        self._given: dict[int, int] = {}  # guesses under way -> bytes
        self._last: int | None = None  # demand under way

    def add(self, job: int, size: int, *, urgent: bool, ready: bool) -> None:
        """A copy is asked for; `ready`: its bytes are in host memory."""
        self._sizes[job] = size
        (self._demands if urgent else self._guesses)[job] = ready

    def ready(self, job: int) -> None:
        """The bytes of `job` have come from the disk."""
        for waiting in (self._demands, self._guesses):
            if job in waiting:
                waiting[job] = True

    def demand(self, job: int) -> None:
        """Somebody waits for a guess now."""
        if job in self._guesses:
            self._demands[job] = self._guesses.pop(job)

    def drop(self, job: int) -> bool:
        """Forget `job`, if it has not begun; whether that is so."""
        found = job in self._demands or job in self._guesses
        if found:
            self._demands.pop(job, None)
            self._guesses.pop(job, None)
            del self._sizes[job]
        return found

    def finished(self, job: int) -> None:
        """`job`, which had begun, is complete."""
        del self._sizes[job]
        self._given.pop(job, None)
        if self._last == job:
            self._last = None

    def begin(self) -> list[Begin]:
        """The copies to give to the link now; they count as begun."""
        begins = []
        for job in [job for job, ready in self._demands.items() if ready]:
            del self._demands[job]
            self._last = job
            begins.append(Begin(job, True, None))
        for job, there in self._guesses.items():
            size = self._sizes[job]
            if self._given and sum(self._given.values()) + size > self._most:
                break
            if there:
                self._given[job] = size
                begins.append(Begin(job, False, self._last))
        for begun in begins:
            self._guesses.pop(begun.job, None)
        return begins

    @property
    def waiting(self) -> list[int]:
        """Jobs that have not begun."""
        return [*self._demands, *self._guesses]

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a job is in two places."""
        waiting = self.waiting
        assert len(set(waiting)) == len(waiting), "a job waits twice"
        assert not set(waiting) & set(self._given), "a job waits and is under way"
        assert {*waiting, *self._given} <= set(self._sizes), "a job without a size"
