"""Timelines as files that Perfetto reads: the Trace Event Format."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.simulator.timeline import Span, Timeline
from tests.benchmarks.chrome import check_chrome_trace


def test_a_written_timeline_is_a_valid_trace(tmp_path: Path) -> None:
    timeline = Timeline("demo")
    timeline.add(Span("compute", "dense (0)", 10.0, 0.5, 0))
    timeline.add(Span("link 0", "load 0/3", 10.25, 0.001, 0, expert=3))
    timeline.write(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    check_chrome_trace(content)
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert spans[0]["ts"] == 0
    assert spans[0]["dur"] == 500_000
    assert spans[1]["ts"] == 250_000
    assert spans[1]["args"] == {"layer": 0, "expert": 3}


def test_only_the_latest_spans_are_kept() -> None:
    timeline = Timeline("demo", most=2)
    for at in range(5):
        timeline.add(Span("compute", str(at), at, 1.0, 0))
    assert [span.name for span in timeline.spans] == ["3", "4"]


def test_an_empty_timeline_is_a_valid_trace() -> None:
    check_chrome_trace({"traceEvents": Timeline("demo").events()})
