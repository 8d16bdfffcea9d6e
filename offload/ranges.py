"""Named ranges of work for the timeline; they cost next to nothing while none is recorded."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch.profiler import record_function

_NOTHING = contextlib.nullcontext()
_recorded = False  # for the whole process and all of its threads, like torch's profiler


def recorded() -> bool:
    """Whether a timeline is being recorded."""
    return _recorded


def work(name: str, layer: int, *experts: int) -> AbstractContextManager[object]:
    """A range that says what is done inside, for which layer and which of its experts."""
    if not _recorded:
        return _NOTHING
    text = f"{name} layer {layer}"  # like "copy layer 3 expert 5" or "experts layer 3 expert 5, 7"
    return record_function(f"{text} expert {', '.join(map(str, experts))}" if experts else text)


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    """Ranges are recorded inside."""
    global _recorded
    _recorded = True
    try:
        yield
    finally:
        _recorded = False
