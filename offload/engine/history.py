"""What a run leaves behind: a routing trace, and its hot experts for the next warm start."""

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from offload.cache.heat import Heat
from offload.cache.policies import Key
from offload.cache.trace.file import TraceWriter
from offload.cache.trace.trace import Event, Guess, TraceError, TraceHeader
from offload.engine.layer import Call
from offload.errors import SourceError
from offload.files import TRACE, check_output, tell_replaced, user_path, write_whole
from offload.quant.pack import PackInfo

logger = logging.getLogger("offload")


class RoutingTrace:
    """A routing trace being written; each event is whole before the next begins.

    The engine tells it what happens, as `engine.host.Watcher` says. When the disk is full the trace
    ends, and the answer goes on.
    """

    def __init__(self, path: str | Path, header: TraceHeader) -> None:
        check_output(path, TRACE)
        tell_replaced(user_path(path), TRACE)
        try:
            self._writer = TraceWriter(user_path(path), header)
        except TraceError as error:
            raise SourceError(str(error)) from None
        self._full = False  # the disk
        self._fresh = False
        self._warmed: list[Key] = []

    def started_over(self) -> None:
        """The slots were emptied."""
        self._fresh = True
        self._warmed.clear()

    def warmed(self, key: Key) -> None:
        """A warm start loaded `key`."""
        self._warmed.append(key)

    def served(self, call: Call, guesses: Sequence[Guess], copies: int) -> None:
        """Write one call; a choice past the layer's experts is a sentinel, and left out."""
        scores = call.weights.tolist()  # sync: only while a routing trace is recorded
        kept = [
            [at for at in zip(*token, strict=True) if 0 <= at[0] < call.layer.num_experts]
            for token in zip(call.chosen, scores, strict=True)
        ]
        event = Event(
            call.layer.index,
            call.prompt,
            tuple(tuple(expert for expert, _ in token) for token in kept),
            tuple(tuple(score for _, score in token) for token in kept),
            tuple(guesses),
            self._fresh,
            tuple(self._warmed),
        )
        if not self._full:
            try:
                self._writer.append(event)
            except TraceError as error:
                self._stop(error)
        self._fresh = False
        self._warmed.clear()

    def close(self) -> None:
        try:
            self._writer.close()
        except TraceError as error:
            self._stop(error)

    def _stop(self, error: TraceError) -> None:
        self._full = True
        logger.warning("%s; the trace ends before the run does", error)


HOT = "hot.json"
VERSION = 1
MOST_BYTES = 2**24  # of the file: 100,000 experts take three million
MOST_USES = 400.0  # uses that halve every 256 tokens add up to 370 at most


def read_hot(pack: Path, info: PackInfo) -> list[tuple[int, int, float]]:
    """(layer, expert, decayed uses) of the run before, the hottest first.

    Empty if the file is missing, foreign or damaged.
    """
    file = pack / HOT
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            return []
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            return []
        hot = [(int(layer), int(expert), float(uses)) for layer, expert, uses in found["hot"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return []  # a missing file only makes the first tokens slower
    sizes = [layer.num_experts for layer in info.layers]
    known = {
        (layer, expert): min(uses, MOST_USES)
        for layer, expert, uses in hot
        if 0 <= layer < len(sizes) and 0 <= expert < sizes[layer] and uses > 0
    }
    hottest = sorted(known.items(), key=lambda item: (-item[1], item[0]))
    return [(*key, uses) for key, uses in hottest]


def write_hot(pack: Path, heat: Heat) -> None:
    """Save the present heat. The last of two processes to save wins; a failure is ignored."""
    hot = [(*key, round(heat.of(*key), 4)) for key in heat.hottest()]
    if hot:
        with contextlib.suppress(OSError):  # a pack may be in a folder that is read-only
            write_whole(pack / HOT, json.dumps({"version": VERSION, "hot": hot}).encode())
