"""Records that left memory are read with several threads before they are touched."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.quant.errors import PackError
from offload.quant.pack import Pack, read_at
from offload.transfer.host import PIECE, HostTransfer, PageIn
from offload.transfer.memory import PAGE
from tests.tiny import EXPERTS

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")


@pytest.fixture
def pack(mixtral_pack: Path) -> Iterator[Pack]:
    opened = Pack(mixtral_pack)
    yield opened
    opened.close()


@pytest.fixture
def page_in(pack: Pack) -> Iterator[PageIn]:
    made = PageIn(pack)
    yield made
    made.close()


class OneFile:
    """A pack of large records in one file, mapped and not touched."""

    record_bytes = (3 << 20) + 1000  # no whole pages: records share some

    def __init__(self, path: Path, count: int) -> None:
        path.write_bytes(os.urandom(4096 + count * self.record_bytes))
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.open = path.open("rb")
        self.path, self.bytes = path, torch.frombuffer(self.mapping, dtype=torch.uint8)

    def place(self, layer: int, expert: int) -> tuple[Path, int]:
        return self.path, 4096 + expert * self.record_bytes

    def read_at(self, layer: int, begin: int, into: memoryview) -> int:
        return read_at(self.open.fileno(), begin, into)

    def record(self, layer: int, expert: int) -> torch.Tensor:
        begin = self.place(layer, expert)[1]
        return self.bytes[begin : begin + self.record_bytes]


def test_only_the_pages_that_left_memory_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = OneFile(tmp_path / "records", 4)
    page_in = PageIn(pack)  # type: ignore[arg-type]
    missing = page_in._missing(0, 2)
    if not missing:
        pytest.skip("this file system keeps everything in memory")
    reads: list[int] = []
    read = page_in._read

    def counted(layer: int, begin: int) -> None:
        reads.append(begin)
        read(layer, begin)

    monkeypatch.setattr(page_in, "_read", counted)
    page_in.bring_in(0, 2)
    assert sorted(reads) == missing
    assert len(missing) * PIECE >= pack.record_bytes
    assert page_in._missing(0, 2) == []
    page_in.bring_in(0, 2)
    assert len(reads) == len(missing)
    page_in.close()
    pack.open.close()


def test_the_pieces_of_a_record_are_where_they_lie_in_its_file(pack: Pack, page_in: PageIn) -> None:
    page_in._mincore = lambda address, size, pages: 0  # nothing is in memory
    for layer, expert in ((0, 0), (1, 3), (2, EXPERTS - 1)):
        path, begin = pack.place(layer, expert)
        end = begin + pack.info.layout_of(layer).record_bytes
        pieces = page_in._missing(layer, expert)
        assert pieces[0] <= begin < pieces[0] + PAGE
        assert pieces[-1] < end <= pieces[-1] + PIECE
        assert all(b - a == PIECE for a, b in itertools.pairwise(pieces))
        bytes_there = path.read_bytes()[begin:end]
        assert bytes_there == pack.record(layer, expert).numpy().tobytes()


def test_urgent_copies_can_be_done_between_two_reads(
    pack: Pack, page_in: PageIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.transfer.host.AT_ONCE", 1)
    monkeypatch.setattr(page_in, "_missing", lambda *_: [0, PAGE, 2 * PAGE])
    looks = []
    page_in.bring_in(0, 0, lambda: looks.append(1))
    assert len(looks) == 2


def test_an_error_of_the_disk_names_the_file(
    pack: Pack, page_in: PageIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(page_in, "_missing", lambda *_: [0])
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(PackError, match=r"cannot read .*experts-00001.*Input/output error"):
        page_in.bring_in(1, 0)


@pytest.mark.parametrize("gone", ["mincore", "preadv"])
def test_a_system_that_cannot_say_what_is_in_memory_works_all_the_same(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    if gone == "preadv":
        monkeypatch.delattr(os, "preadv")
    else:
        monkeypatch.setattr("offload.transfer.host._mincore", lambda: None)
    transfer = HostTransfer(pack, 1)
    transfer.wait(transfer.start(0, 2, 0, urgent=True))
    assert torch.equal(transfer.slot(0), pack.record(0, 2))
    transfer.close()
