"""Who was busy when in a simulated run, as a file for ui.perfetto.dev (Trace Event Format)."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

MOST = 500_000  # spans kept, the latest ones: about 60 MB of JSON


class Span(NamedTuple):
    """`name` was going on on `track` for `seconds` from `begin` on."""

    track: str
    name: str
    begin: float
    seconds: float
    layer: int
    expert: int | None = None


class Timeline:
    """Spans in the order in which they were added."""

    def __init__(self, process: str, most: int = MOST) -> None:
        self.process = process
        self.spans: deque[Span] = deque(maxlen=most)

    def add(self, span: Span) -> None:
        self.spans.append(span)

    def events(self) -> list[dict[str, Any]]:
        """The file's events; the earliest span begins at 0."""
        spans = tuple(self.spans)  # a copy thread may add some yet
        zero = min((span.begin for span in spans), default=0.0)
        tracks = {track: i for i, track in enumerate(dict.fromkeys(s.track for s in spans))}
        rows: list[dict[str, Any]] = [_name("process_name", self.process, 0)]
        rows += [_name("thread_name", track, thread) for track, thread in tracks.items()]
        for span in spans:
            details = {"layer": span.layer}
            if span.expert is not None:
                details["expert"] = span.expert
            rows.append(
                {
                    "name": span.name,
                    "ph": "X",
                    "ts": round((span.begin - zero) * 1e6, 3),
                    "dur": round(span.seconds * 1e6, 3),
                    "pid": 0,
                    "tid": tracks[span.track],
                    "args": details,
                }
            )
        return rows

    def write(self, file: Path) -> None:
        """Write all of it; an earlier file gives way only to a whole one."""
        part = file.with_name(file.name + ".part")
        content = {
            "moe-offload": "simulator",
            "traceEvents": self.events(),
            "displayTimeUnit": "ms",
        }
        part.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
        part.replace(file)


def _name(what: str, name: str, thread: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}
