"""Routing traces in files.

A file is a line of JSON (the header), then blocks. A block is a u32 length, a u32 CRC-32, and that
many bytes of one deflate stream, which runs through all blocks and is flushed at the end of each. A
block holds whole records and is written with one call, so a run that is killed at any moment loses
at most its last block. A decoded token takes about 5 bytes a layer at top-2.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from offload.cache.trace.trace import Event, Guess, Trace, TraceError, TraceHeader

FORMAT, VERSION = "offload-trace", 1
MAX_HEADER = 1 << 20
MAX_BLOCK = 1 << 28
MOST = 1 << 16  # layers, and experts of a layer, that the fields of a record can hold
PROMPT, FRESH, RAGGED, SCORED = 1, 2, 4, 8  # bits of a record's first byte
HALF_MAX = 65504.0  # the largest float16
_BLOCK = struct.Struct("<II")
RECORD = "<BHIBBH"  # bits, layer, T, k, guesses, warmed
GUESS = "<HH?"  # layer, experts, live


class _Written(NamedTuple):
    """What a file holds so far. It is replaced as a whole, so Ctrl-C cannot leave half a state."""

    size: int
    pack: zlib._Compress
    pending: list[bytes]  # records of the next block


class TraceWriter:
    """Appends events to a new file; every call of layer 0 closes the block before it.

    After Ctrl-C at any point, a block that was not noted as written is written again.
    Raises `TraceError` where the file cannot be written.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self._sign = _sign(header)
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise TraceError(f"cannot write a trace to {path}: {error.strerror}") from None
        about = {"format": FORMAT, "version": VERSION, **asdict(header)}
        line = json.dumps(about, ensure_ascii=False).encode() + b"\n"
        self._written = _Written(0, zlib.compressobj(6, zlib.DEFLATED, -15), [])
        self._write(line)
        self._written = self._written._replace(size=len(line))

    def append(self, event: Event) -> None:
        if event.layer == 0:
            self.flush()
        self._written.pending.append(_encode(event, self._sign))

    def flush(self) -> None:
        """Write what was appended so far. Raises `TraceError` after closing the file."""
        size, before, pending = self._written
        if pending:
            pack = before.copy()
            data = pack.compress(b"".join(pending)) + pack.flush(zlib.Z_SYNC_FLUSH)
            block = _BLOCK.pack(len(data), zlib.crc32(data)) + data
            self._write(block)
            self._written = _Written(size + len(block), pack, [])

    def _write(self, data: bytes) -> None:
        """Append `data` after the last complete block, over what an interrupted flush left."""
        rest = memoryview(data)
        try:
            if self._file.tell() != self._written.size:  # an earlier flush was interrupted
                self._file.seek(self._written.size)
                self._file.truncate()
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.close()
            raise TraceError(f"cannot write a trace to {self.path}: {error.strerror}") from None

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()


def write(path: Path, trace: Trace) -> None:
    """Write a whole trace."""
    writer = TraceWriter(path, trace.header)
    for event in trace.events:
        writer.append(event)
    writer.close()


def read(path: Path) -> Trace:
    """The trace in `path`, without a last block that a killed run did not finish.

    Raises `TraceError` for a file that is not a trace, or is damaged before its end.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from None
    line, newline, _ = data[:MAX_HEADER].partition(b"\n")
    header = _header(path, line if newline else b"")
    body = data[len(line) + 1 :]
    try:
        return Trace(header, list(_decode(_blocks(body), header)))
    except (_Damage, zlib.error, struct.error, IndexError) as error:
        raise TraceError(f"the trace {path} is damaged ({error}): record it again") from None


class _Damage(Exception):
    pass


def _header(path: Path, line: bytes) -> TraceHeader:
    try:
        about: dict[str, Any] = json.loads(line)
        if about["format"] != FORMAT:
            raise ValueError
        if (version := about["version"]) != VERSION:
            raise TraceError(
                f"{path} is a trace of version {version}, this program reads {VERSION}: record it "
                "again"
            )
        header = TraceHeader(
            model=str(about["model"]),
            experts=tuple(int(n) for n in about["experts"]),
            top_k=int(about["top_k"]),
            record_bytes=tuple(int(n) for n in about["record_bytes"]),
            settings=dict(about["settings"]),
        )
        if not (
            0 < len(header.experts) == len(header.record_bytes) < MOST
            and all(0 < experts < MOST for experts in header.experts)
            and min(header.top_k, *header.record_bytes) > 0
        ):
            raise ValueError
        return header
    except TraceError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise TraceError(f"{path} is not a trace: name a file that --trace wrote") from None


def _blocks(body: bytes) -> Iterator[bytes]:
    """The records of each whole block."""
    unpack = zlib.decompressobj(-15)
    at = 0
    while at + _BLOCK.size <= len(body):
        length, crc = _BLOCK.unpack_from(body, at)
        at += _BLOCK.size
        block = body[at : at + length]
        at += length
        if len(block) < length:  # the run was killed while it wrote
            return
        if zlib.crc32(block) != crc:
            raise _Damage(f"a checksum does not match before byte {at}")
        records = unpack.decompress(block, MAX_BLOCK)
        if unpack.unconsumed_tail:
            raise _Damage("a block is larger than any run writes")
        yield records


def _sign(header: TraceHeader) -> str:
    """The struct letter of an expert's number."""
    return "B" if max(header.experts) <= 256 else "H"


def _encode(event: Event, sign: str) -> bytes:
    rows = event.experts
    k = len(rows[0]) if rows else 0
    ragged = any(len(row) != k for row in rows)
    chosen = [expert for row in rows for expert in row]
    scores = [max(-HALF_MAX, min(HALF_MAX, score)) for row in event.scores for score in row]
    assert len(scores) in (0, len(chosen)), "a score for each choice, or none"
    bits = event.prompt * PROMPT | event.fresh * FRESH | ragged * RAGGED | bool(scores) * SCORED
    parts = [
        struct.pack(RECORD, bits, event.layer, len(rows), k, len(event.guesses), len(event.warmed))
    ]
    if ragged:
        parts.append(bytes(len(row) for row in rows))
    parts.append(struct.pack(f"<{len(chosen)}{sign}{len(scores)}e", *chosen, *scores))
    for guess in event.guesses:
        parts.append(struct.pack(GUESS, guess.layer, len(guess.experts), guess.live))
        parts.append(struct.pack(f"<{len(guess.experts)}{sign}", *guess.experts))
    parts.extend(struct.pack(f"<H{sign}", *key) for key in event.warmed)
    return b"".join(parts)


class _Reader:
    """Reads a block's values one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, pattern: str) -> tuple[Any, ...]:
        values = struct.unpack_from(pattern, self.data, self.at)
        self.at += struct.calcsize(pattern)
        return values


def _decode(blocks: Iterator[bytes], header: TraceHeader) -> Iterator[Event]:
    sign = _sign(header)
    for block in blocks:
        reader = _Reader(block)
        while reader.at < len(block):
            event = _record(reader, sign)
            named = [(event.layer, row) for row in event.experts]
            named += [(guess.layer, guess.experts) for guess in event.guesses]
            named += [(layer, (expert,)) for layer, expert in event.warmed]
            for layer, experts in named:
                if layer >= header.layers or any(e >= header.experts[layer] for e in experts):
                    raise _Damage(f"there is no such expert in layer {layer}")
            yield event


def _record(reader: _Reader, sign: str) -> Event:
    bits, layer, tokens, k, guesses, warmed = reader.take(RECORD)
    if tokens > len(reader.data):
        raise _Damage("a call of more tokens than the block has bytes")
    lengths = reader.take(f"<{tokens}B") if bits & RAGGED else (k,) * tokens
    total = sum(lengths)
    chosen = reader.take(f"<{total}{sign}")
    scores = reader.take(f"<{total}e") if bits & SCORED else ()
    named = []
    for _ in range(guesses):
        ahead, count, live = reader.take(GUESS)
        named.append(Guess(ahead, reader.take(f"<{count}{sign}"), live))
    keys = [reader.take(f"<H{sign}") for _ in range(warmed)]
    return Event(
        layer,
        bool(bits & PROMPT),
        _rows(chosen, lengths),
        _rows(scores, lengths) if scores else (),
        tuple(named),
        bool(bits & FRESH),
        tuple((ahead, expert) for ahead, expert in keys),
    )


def _rows(flat: tuple[Any, ...], lengths: tuple[int, ...]) -> tuple[tuple[Any, ...], ...]:
    values = iter(flat)
    return tuple(tuple(islice(values, length)) for length in lengths)
