"""Records that the disk tier reads again after their file was changed, replaced, or fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.lines import one_line
from offload.quant.errors import OffloadError, PackError
from offload.quant.pack import Pack
from offload.transfer.disk_tier import DiskTier, RecordFiles
from offload.transfer.memory import own_memory

FIRST, OTHER = (1, 3), (0, 0)  # of two files


@pytest.fixture
def pack(mixtral_pack: Path, tmp_path: Path) -> Iterator[Pack]:
    """A pack that may be harmed."""
    opened = Pack(Path(shutil.copytree(mixtral_pack, tmp_path / "pack")))
    yield opened
    opened.close()


@pytest.fixture
def tier(pack: Pack) -> Iterator[DiskTier]:
    """One buffer: each record is read from its file again when another one was wanted."""
    made = DiskTier(RecordFiles(pack), [own_memory(pack.info.slot_bytes)], readers=1)
    yield made
    made.close()


def brought(tier: DiskTier, key: tuple[int, int]) -> Tensor:
    read = tier.want(*key, urgent=True)
    try:
        assert tier.wait(read, 10)
        return tier.bytes_of(read).clone()
    finally:
        tier.release(read)


def _flip(file: Path, begin: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(begin + 7)
        byte = handle.read(1)[0]
        handle.seek(begin + 7)
        handle.write(bytes([byte ^ 4]))


def _truncate(file: Path, begin: int) -> None:
    os.truncate(file, begin + 100)


def _overwrite(file: Path, begin: int) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _replace(file: Path, begin: int) -> None:
    (file.parent / "other").write_bytes(bytes(file.stat().st_size))
    (file.parent / "other").replace(file)


@pytest.mark.parametrize("harm", [_flip, _truncate, _overwrite])
def test_a_file_that_is_changed_after_its_record_was_checked_is_noticed(
    harm: Callable[[Path, int], None], pack: Pack, tier: DiskTier
) -> None:
    brought(tier, FIRST)
    other = brought(tier, OTHER)
    harm(*pack.place(*FIRST))
    for _ in range(2):
        with pytest.raises(PackError, match=r"experts-00001.*changed while it was in use"):
            brought(tier, FIRST)
        assert torch.equal(brought(tier, OTHER), other)
    tier.pool.check_integrity()


def test_a_file_that_is_replaced_is_read_as_it_was(pack: Pack, tier: DiskTier) -> None:
    good = brought(tier, FIRST)
    brought(tier, OTHER)
    _replace(*pack.place(*FIRST))
    assert torch.equal(brought(tier, FIRST), good)
    unread = (FIRST[0], FIRST[1] + 1)  # nor does a record's first reading see the other
    assert torch.equal(brought(tier, unread), pack.record(*unread))


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs reads at a place")
def test_a_disk_that_fails_is_one_line_and_reading_goes_on(
    pack: Pack, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(OffloadError) as raised:
            brought(tier, FIRST)
    line = one_line(raised.value)
    assert line == str(raised.value)
    assert "\n" not in line
    assert f"cannot read {pack.place(*FIRST)[0]} (Input/output error)" in line
    assert torch.equal(brought(tier, FIRST), pack.record(*FIRST))
    tier.pool.check_integrity()


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs reads at a place")
@pytest.mark.parametrize("how", ["short reads", "no such call"])
def test_a_record_is_whole_however_the_system_reads(
    how: str, pack: Pack, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    if how == "no such call":
        monkeypatch.delattr(os, "preadv")
    else:
        monkeypatch.setattr(os, "preadv", lambda file, into, at: whole(file, [into[0][:1000]], at))
    assert torch.equal(brought(tier, FIRST), pack.record(*FIRST))
