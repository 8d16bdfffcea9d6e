"""What the Trace Event Format asks of a file ("Trace Event Format", Google, JSON object form)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def check_chrome_trace(content: dict[str, Any]) -> None:
    """Raise `AssertionError` where Perfetto or chrome://tracing would stumble."""
    named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
    lanes: dict[Any, list[tuple[float, float]]] = {}
    for event in content["traceEvents"]:
        assert event["ph"] in ("X", "M"), event
        assert isinstance(event["pid"], int), event
        assert isinstance(event["tid"], int), event
        lane = (event["pid"], event["tid"])
        if event["ph"] == "M":
            named[event["name"]].add(event["pid"] if event["name"] == "process_name" else lane)
            assert isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0, event
        assert event["dur"] >= 0, event
        assert lane[0] in named["process_name"], event
        assert lane in named["thread_name"], event
        lanes.setdefault(lane, []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():  # on one lane spans follow each other (or nest)
        spans.sort(key=lambda span: (span[0], -span[1]))
        for (_, end), (begin, following) in pairwise(spans):
            assert begin >= end - 0.002 or following <= end + 0.002, "spans cross"
