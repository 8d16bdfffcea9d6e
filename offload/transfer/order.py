"""The order in which copies begin: urgent ones before guesses, and few guesses at a time."""

from collections import deque
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")  # can be hashed


class UrgentFirst(Generic[T]):
    """Items that wait, urgent ones before guesses, each kind in the order asked for.

    Every method changes a deque by one call that neither another thread nor Ctrl-C can cut in two.
    Only `urge` makes two such calls: an item is in neither deque for a moment.
    """

    def __init__(self) -> None:
        self.urgent: deque[T] = deque()
        self.guesses: deque[T] = deque()

    def __contains__(self, item: T) -> bool:
        return item in self.urgent or item in self.guesses

    def add(self, item: T, *, urgent: bool) -> None:
        """Append `item` to its kind."""
        (self.urgent if urgent else self.guesses).append(item)

    def urge(self, item: T) -> bool:
        """Make a guess the last urgent item, since somebody waits for it now. Returns False if
        `item` is not a guess that still waits."""
        if not _removed(self.guesses, item):
            return False
        self.urgent.append(item)
        return True

    def remove(self, item: T) -> bool:
        """Take `item` out wherever it waits; False: it does not wait any more."""
        return _removed(self.guesses, item) or _removed(self.urgent, item)

    def first(self) -> T | None:
        """The item whose turn is next."""
        queue = self.urgent or self.guesses
        return queue[0] if queue else None

    def pop(self) -> T | None:
        """Take out the item whose turn is next; another thread may add or remove meanwhile."""
        for queue in (self.urgent, self.guesses):
            try:
                return queue.popleft()
            except IndexError:
                continue
        return None

    def clear(self) -> None:
        """Nothing waits."""
        self.urgent.clear()
        self.guesses.clear()


def _removed(queue: deque[T], item: T) -> bool:
    try:
        queue.remove(item)
    except ValueError:
        return False
    return True


class Begin(NamedTuple, Generic[T]):
    """Give `job` to the link now: to the stream of urgent copies or to that of guesses."""

    job: T
    urgent: bool
    after: T | None  # urgent copy on the other stream that must complete before `job` begins


class CopyOrder(Generic[T]):
    """Copies asked for and not yet complete, for a link that works off two streams.

    A stream works in order, so with one stream an urgent copy would wait for every guess before it,
    and with two alone guesses could take half the link. Here a guess begins on its own stream when
    the urgent copies given before it are complete, which the device sees to without the host. At
    most `most` bytes of guesses are under way at a time, so a later urgent copy shares the link
    with no more than that.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: UrgentFirst[T] = UrgentFirst()
        self._ready: set[T] = set()  # jobs whose bytes are in host memory
        self._sizes: dict[T, int] = {}  # of all jobs
        self._given: dict[T, int] = {}  # guesses under way -> bytes
        self._last: T | None = None  # urgent copy under way

    def add(self, job: T, size: int, *, urgent: bool, ready: bool) -> None:
        """Add a copy that is asked for; `ready` says that its bytes are in host memory."""
        self._sizes[job] = size
        self._waiting.add(job, urgent=urgent)
        if ready:
            self._ready.add(job)

    def ready(self, job: T) -> None:
        """The bytes of `job` have come from the disk."""
        if job in self._waiting:
            self._ready.add(job)

    def urge(self, job: T) -> None:
        """Somebody waits for a guess now."""
        self._waiting.urge(job)

    def drop(self, job: T) -> bool:
        """Forget `job` if it has not begun, and return whether it was forgotten."""
        found = self._waiting.remove(job)
        if found:
            del self._sizes[job]
            self._ready.discard(job)
        return found

    def finished(self, job: T) -> None:
        """`job`, which had begun, is complete."""
        del self._sizes[job]
        self._given.pop(job, None)
        if self._last == job:
            self._last = None

    def begin(self) -> list[Begin[T]]:
        """The copies to give to the link now; they count as begun."""
        begins = []
        for job in self._waiting.urgent:
            if job in self._ready:
                self._last = job
                begins.append(Begin(job, True, None))
        for job in self._waiting.guesses:
            size = self._sizes[job]
            if self._given and sum(self._given.values()) + size > self._most:
                break
            if job in self._ready:
                self._given[job] = size
                begins.append(Begin(job, False, self._last))
        for begun in begins:
            self._waiting.remove(begun.job)
            self._ready.discard(begun.job)
        return begins

    def __contains__(self, job: T) -> bool:
        """Whether `job` was asked for and has not begun."""
        return job in self._waiting

    @property
    def waiting(self) -> list[T]:
        """Jobs that have not begun."""
        return [*self._waiting.urgent, *self._waiting.guesses]

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a job is in two places."""
        waiting = self.waiting
        assert len(set(waiting)) == len(waiting), "a job waits twice"
        assert not set(waiting) & set(self._given), "a job waits and is under way"
        assert {*waiting, *self._given} <= set(self._sizes), "a job without a size"
        assert self._ready <= set(waiting), "a job is ready and does not wait"
