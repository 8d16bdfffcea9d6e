"""Traces come back as they were written, also from runs that were killed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.cache.trace.file import TraceWriter, read, write
from offload.cache.trace.trace import Event, Guess, Trace, TraceError, TraceHeader
from tests.full_disk import full_beyond
from tests.interrupt import interrupt_before

LAYERS, EXPERTS = 3, 5
HEADER = TraceHeader("tiny", (EXPERTS,) * LAYERS, 2, (100,) * LAYERS, {"slots": 4, "policy": "lru"})

experts = st.integers(0, EXPERTS - 1)
layers = st.integers(0, LAYERS - 1)
halves = st.floats(width=16, allow_nan=False, allow_infinity=False)


@st.composite
def events(draw: st.DrawFn) -> Event:
    rows = draw(st.lists(st.lists(experts, max_size=3).map(tuple), max_size=4).map(tuple))
    scored = draw(st.booleans()) and any(rows)
    scores = tuple(tuple(draw(halves) for _ in row) for row in rows) if scored else ()
    guess = st.builds(Guess, layers, st.lists(experts, max_size=3).map(tuple), st.booleans())
    return Event(
        draw(layers),
        draw(st.booleans()),
        rows,
        scores,
        tuple(draw(st.lists(guess, max_size=2))),
        draw(st.booleans()),
        tuple(draw(st.lists(st.tuples(layers, experts), max_size=2))),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(events(), max_size=12))
def test_a_trace_comes_back_as_it_was_written(written: list[Event], tmp_path: Path) -> None:
    write(tmp_path / "t", Trace(HEADER, written))
    assert read(tmp_path / "t") == Trace(HEADER, written)


def _tokens(count: int) -> list[Event]:
    return [
        Event(layer, token == 0, ((token % EXPERTS, layer),), ((0.75, 0.25),))
        for token in range(count)
        for layer in range(LAYERS)
    ]


def test_a_trace_cut_anywhere_gives_the_tokens_before_the_cut(tmp_path: Path) -> None:
    write(tmp_path / "whole", Trace(HEADER, _tokens(9)))
    data = (tmp_path / "whole").read_bytes()
    seen = set()
    for cut in range(data.index(b"\n") + 1, len(data)):
        (tmp_path / "cut").write_bytes(data[:cut])
        found = list(read(tmp_path / "cut").events)
        assert found == _tokens(9)[: len(found)]
        seen.add(len(found))
    assert seen == {LAYERS * tokens for tokens in range(9)}


def test_a_run_that_is_not_closed_leaves_every_token_but_the_last(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", HEADER)
    for event in _tokens(6):
        writer.append(event)
    assert list(read(tmp_path / "t").events) == _tokens(5)
    writer.close()
    assert list(read(tmp_path / "t").events) == _tokens(6)


def test_ctrl_c_anywhere_in_a_flush_leaves_a_whole_trace(tmp_path: Path) -> None:
    at, interrupted = 0, True
    while interrupted:
        writer = TraceWriter(tmp_path / "t", HEADER)
        for event in _tokens(2):
            writer.append(event)
        interrupted = interrupt_before(writer.flush, at)
        for event in _tokens(3)[-LAYERS:]:
            writer.append(event)
        writer.close()
        assert list(read(tmp_path / "t").events) == _tokens(3), f"after Ctrl-C at {at}"
        at += 1
    assert at > 40


def test_what_a_full_disk_took_can_be_read(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", HEADER)
    room = (tmp_path / "t").stat().st_size + 200
    with full_beyond(room), pytest.raises(TraceError, match="cannot write"):
        [writer.append(event) for event in _tokens(50)]
    writer.close()
    assert (tmp_path / "t").stat().st_size == room
    found = list(read(tmp_path / "t").events)
    assert found
    assert found == _tokens(50)[: len(found)]


@pytest.mark.parametrize(
    "change",
    [
        {"experts": [1e400] * LAYERS},
        {"experts": [0] * LAYERS},
        {"experts": [-5] * LAYERS},
        {"experts": [10**9] * LAYERS},
        {"experts": [5]},
        {"experts": []},
        {"top_k": 0},
        {"record_bytes": [0] * LAYERS},
        {"settings": 7},
    ],
)
def test_a_header_that_describes_no_model_is_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    write(tmp_path / "t", Trace(HEADER, _tokens(2)))
    line, _, body = (tmp_path / "t").read_bytes().partition(b"\n")
    (tmp_path / "t").write_bytes(json.dumps(json.loads(line) | change).encode() + b"\n" + body)
    with pytest.raises(TraceError, match="not a trace"):
        read(tmp_path / "t")


def test_a_flipped_bit_is_an_error_not_another_trace(tmp_path: Path) -> None:
    write(tmp_path / "t", Trace(HEADER, _tokens(6)))
    data = bytearray((tmp_path / "t").read_bytes())
    start = data.index(b"\n") + 1
    for at in range(start + 4, len(data)):  # a wrong length may look like a run that was killed
        damaged = bytearray(data)
        damaged[at] ^= 16
        (tmp_path / "d").write_bytes(damaged)
        with contextlib.suppress(TraceError):
            found = list(read(tmp_path / "d").events)
            assert found == _tokens(6)[: len(found)]
            assert len(found) < 6 * LAYERS


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"{}\n", b"\xff" * 99, b'{"format":1}\n'])
def test_a_file_that_is_not_a_trace_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError, match="not a trace"):
        read(tmp_path / "t")


def test_a_trace_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t", Trace(HEADER, []))
    about = json.loads((tmp_path / "t").read_bytes())
    (tmp_path / "t").write_text(json.dumps({**about, "version": 9}) + "\n")
    with pytest.raises(TraceError, match="version 9"):
        read(tmp_path / "t")


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read"):
        read(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="cannot write"):
        TraceWriter(tmp_path / "no" / "where", HEADER)


def test_a_decoded_token_costs_few_bytes(tmp_path: Path) -> None:
    write(tmp_path / "t", Trace(HEADER, _tokens(400)))
    assert (tmp_path / "t").stat().st_size < 400 * LAYERS * 16
