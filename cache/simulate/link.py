"""A link in simulated time: one copy after the other, urgent ones first.

Knows: when each copy begins and ends. Does not know: bytes, slots, why something is copied.
A copy that has begun runs to its end: an urgent copy waits for the rest of at most one other. (The
host's copy thread even gives way in the middle; a CUDA stream, which works in order, is not
modelled.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Copy:
    """One copy; `begin` and `end` are known once the link has come to it."""

    seconds: float
    earliest: float  # not before this moment
    urgent: bool
    begin: float | None = None
    end: float | None = None


class Link:
    """Copies in simulated seconds. Moments given to it never go back."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.busy_seconds = 0.0
        self.guess_delay_seconds = 0.0  # urgent copies waited for the rest of others
        self._under_way: Copy | None = None
        self._queues: tuple[deque[Copy], deque[Copy]] = (deque(), deque())  # urgent first

    def submit(self, now: float, seconds: float, *, urgent: bool, earliest: float = 0.0) -> Copy:
        """Queue a copy at `now` that may begin at `earliest` or later."""
        self.advance(now)
        copy = Copy(seconds, max(now, earliest), urgent)
        before = self._under_way
        if urgent and before is not None and not before.urgent:
            self.guess_delay_seconds += max(0.0, self.free_at - copy.earliest)
        self._queues[0 if urgent else 1].append(copy)
        return copy

    def advance(self, now: float) -> None:
        """Begin every copy whose turn comes before `now`."""
        while (copy := self._next()) is not None and max(self.free_at, copy.earliest) < now:
            self._begin(copy)

    def wait(self, now: float, copy: Copy) -> float:
        """The moment `copy` is complete, when from `now` on somebody waits for it."""
        self.advance(now)
        if copy.end is None and not copy.urgent:  # as `offload.transfer` does
            self._queues[1].remove(copy)
            self._queues[0].append(copy)
            copy.urgent = True
        while copy.end is None:
            following = self._next()
            assert following is not None
            self._begin(following)
        return copy.end

    def drop(self, now: float, copy: Copy) -> bool:
        """Take a copy out of the queue, unless it has begun."""
        self.advance(now)
        if copy.begin is not None:
            return False
        self._queues[0 if copy.urgent else 1].remove(copy)
        return True

    def backlog(self, now: float) -> float:
        """Seconds of copying that are begun or queued at `now`."""
        self.advance(now)
        queued = sum(copy.seconds for queue in self._queues for copy in queue)
        return max(0.0, self.free_at - now) + queued

    def _next(self) -> Copy | None:
        for queue in self._queues:
            if queue:
                return queue[0]
        return None

    def _begin(self, copy: Copy) -> None:
        self._queues[0 if copy.urgent else 1].popleft()
        self._under_way = copy
        copy.begin = max(self.free_at, copy.earliest)
        self.free_at = copy.end = copy.begin + copy.seconds
        self.busy_seconds += copy.seconds
