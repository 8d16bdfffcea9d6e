"""Records in host memory: pinned, refused, half pinned, and read from disk where RAM is small."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.quant.errors import PackError
from offload.quant.pack import Pack, PackLayer
from offload.transfer.disk_tier import DiskTier, Read, RecordFiles
from offload.transfer.host_tier import LEAST_BUFFERS, HostTier
from offload.transfer.memory import PAGE, own_memory
from tests.interrupt import interrupt_before
from tests.tiny import EXPERTS, LAYERS

EVERYTHING = 1 << 40


def same_rate(sample: Tensor) -> float:
    """Stands in for measuring: no way of holding records is faster than another."""
    return 1e9


class Limited:
    """Refuses to pin more than `limit` bytes in all, and mapped files if told to."""

    remedy = "give it more"

    def __init__(self, limit: int = EVERYTHING, *, files: bool = True) -> None:
        self.limit, self.files = limit, files
        self.held: dict[int, int] = {}
        self.most = 0

    def pin(self, address: int, size: int, *, read_only: bool) -> str | None:
        assert address % PAGE == 0
        assert size % PAGE == 0
        if read_only and not self.files:
            return "CUDA error 801, operation not supported"
        if sum(self.held.values()) + size > self.limit:
            return "CUDA error 2, out of memory"
        assert address not in self.held, "pinned twice"
        self.held[address] = size
        self.most = max(self.most, sum(self.held.values()))
        return None

    def unpin(self, address: int, size: int) -> None:
        assert self.held.pop(address) == size


class LockPinner:
    """Pins without a GPU: the operating system may not page the memory out."""

    remedy = "raise the limit of locked memory (ulimit -l), or lower --ram"

    def __init__(self) -> None:
        self._libc = None if os.name == "nt" else ctypes.CDLL(None, use_errno=True)

    def pin(self, address: int, size: int, *, read_only: bool) -> str | None:
        if self._libc is None:
            return "this system has no mlock"
        if self._libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
            return os.strerror(ctypes.get_errno())
        return None

    def unpin(self, address: int, size: int) -> None:
        assert self._libc is not None, "nothing was pinned"
        self._libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))


@pytest.fixture
def pack(mixtral_pack: Path) -> Iterator[Pack]:
    opened = Pack(mixtral_pack)
    yield opened
    opened.close()


def keys(pack: Pack) -> list[tuple[int, int]]:
    return [(i, e) for i, layer in enumerate(pack.info.layers) for e in range(layer.num_experts)]


def at_address(address: int, size: int) -> Tensor:
    return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=torch.uint8)


@pytest.mark.parametrize("files", [True, False])
def test_every_record_is_pinned_in_place_or_as_a_copy(pack: Pack, files: bool) -> None:
    pinner = Limited(files=files)
    tier = HostTier(pack, EVERYTHING, pinner, same_rate)
    assert tier.pinned
    assert ("own pages" in tier.description) is files
    for layer, expert in keys(pack):
        record = tier.record(layer, expert)
        assert torch.equal(record, pack.record(layer, expert))
        assert torch.equal(at_address(record.data_ptr(), record.numel()), record)
        assert any(a <= record.data_ptr() < a + size for a, size in pinner.held.items())
    tier.close()
    assert not pinner.held


@pytest.mark.parametrize(
    ("in_place", "copied", "chosen"), [(9e9, 20e9, "copy"), (20e9, 20.5e9, "own")]
)
def test_the_faster_way_is_chosen_and_both_rates_are_told(
    pack: Pack, in_place: float, copied: float, chosen: str
) -> None:
    rates = iter([in_place, copied])

    def rate(sample: Tensor) -> float:
        assert sample.dim() == 1
        return next(rates)

    tier = HostTier(pack, EVERYTHING, Limited(), rate)
    assert chosen in tier.description
    assert f"in place {in_place / 1e9:.1f} GB/s, copied {copied / 1e9:.1f} GB/s" in tier.description
    tier.close()


def test_the_description_has_a_refusal_beside_the_rate_of_the_other_way(pack: Pack) -> None:
    tier = HostTier(pack, EVERYTHING, Limited(files=False), lambda _: 20e9)
    assert "in place refused: CUDA error 801" in tier.description
    tier.close()


def test_without_any_pinning_a_warning_comes_and_records_come_from_the_files(
    pack: Pack, caplog: pytest.LogCaptureFixture
) -> None:
    tier = HostTier(pack, EVERYTHING, Limited(0), same_rate)
    assert not tier.pinned
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "CUDA error 2, out of memory" in line
    assert "give it more" in line
    for key in keys(pack):
        assert torch.equal(tier.record(*key), pack.record(*key))
    tier.close()


@pytest.mark.parametrize("files", [True, False])
def test_a_limit_reached_half_way_keeps_what_was_pinned(
    pack: Pack, caplog: pytest.LogCaptureFixture, files: bool
) -> None:
    layer_bytes = -(-EXPERTS * pack.info.slot_bytes // PAGE) * PAGE
    pinner = Limited(2 * layer_bytes + PAGE, files=files)
    tier = HostTier(pack, EVERYTHING, pinner, same_rate)
    assert not tier.pinned
    pinned = [
        any(begin <= tier.record(layer, 0).data_ptr() < begin + size for begin, size in ranges)
        for ranges in [pinner.held.items()]
        for layer in range(LAYERS)
    ]
    assert pinned == [True, True, False]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "can be pinned" in line
    for key in keys(pack):
        assert torch.equal(tier.record(*key), pack.record(*key))
    tier.close()
    assert not pinner.held


def damaged(mixtral_pack: Path, folder: Path) -> Pack:
    """The pack with one wrong bit in expert 0 of layer 1."""
    import shutil

    shutil.copytree(mixtral_pack, folder)
    file = folder / PackLayer.file_name(1)
    data = bytearray(file.read_bytes())
    data[4096 + 5] ^= 1
    file.write_bytes(data)
    return Pack(folder)


@pytest.mark.parametrize("files", [True, False])
def test_a_damaged_record_is_refused_and_nothing_stays_pinned(
    mixtral_pack: Path, tmp_path: Path, files: bool
) -> None:
    pack, pinner = damaged(mixtral_pack, tmp_path / "pack"), Limited(files=files)
    with pytest.raises(PackError, match=r"experts-00001.*expert 0"):
        HostTier(pack, EVERYTHING, pinner, same_rate)
    assert not pinner.held


@pytest.mark.parametrize("limit", [EVERYTHING, 0])
@pytest.mark.parametrize("files", [True, False])
def test_a_file_written_to_afterwards_is_noticed_unless_all_was_copied(
    mixtral_pack: Path, tmp_path: Path, files: bool, limit: int
) -> None:
    import shutil

    pack = Pack(Path(shutil.copytree(mixtral_pack, tmp_path / "pack")))
    tier = HostTier(pack, EVERYTHING, Limited(limit, files=files), same_rate)
    before = tier.record(1, 0).clone()
    file, begin = pack.place(1, 0)
    with file.open("r+b") as handle:
        handle.seek(begin)
        handle.write(bytes(64))
    if limit and not files:
        assert torch.equal(tier.record(1, 0), before)
    else:
        with pytest.raises(PackError, match="changed while it was in use"):
            tier.record(1, 0)
    tier.close()
    pack.close()


def test_a_record_is_checked_once(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Pack, "check_record", lambda _, layer, e, record=None: checked.append((layer, e))
    )
    tier = HostTier(pack, EVERYTHING, Limited(0), same_rate)
    for _ in range(3):
        for key in keys(pack):
            tier.record(*key)
    assert checked == keys(pack)
    tier.close()


def test_the_last_user_to_leave_frees_everything(pack: Pack) -> None:
    pinner = Limited()
    tier = HostTier(pack, EVERYTHING, pinner, same_rate)
    tier.join()
    tier.join()
    tier.leave()
    assert pinner.held
    tier.leave()
    assert not pinner.held


def test_memory_is_locked_where_there_is_no_gpu(pack: Pack) -> None:
    tier = HostTier(pack, EVERYTHING, LockPinner(), same_rate)
    if not tier.pinned:
        pytest.skip("this system locks no memory")
    assert locked_bytes() > 0
    tier.close()
    assert locked_bytes() == 0


def locked_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmLck")))


def test_the_lock_pinner_says_why_it_is_refused() -> None:
    assert LockPinner().pin(PAGE, PAGE, read_only=False) == "Cannot allocate memory"


def brought(tier: HostTier, layer: int, expert: int) -> Tensor:
    assert tier.disk is not None
    read = tier.disk.want(layer, expert, urgent=True)
    while not tier.disk.wait(read, 1.0):
        pass
    record = tier.record(layer, expert, read).clone()
    tier.disk.release(read)
    return record


@pytest.mark.parametrize("ram", [0, 6])
def test_with_little_ram_every_record_comes_from_the_disk(
    pack: Pack, caplog: pytest.LogCaptureFixture, ram: int
) -> None:
    pinner = Limited()
    tier = HostTier(pack, ram * (pack.info.slot_bytes + 256), pinner, same_rate)
    assert tier.disk is not None
    buffers = max(ram, LEAST_BUFFERS)
    assert tier.disk.pool.table.slots == buffers
    assert tier.pinned
    assert f"RAM holds {buffers} of {EXPERTS * LAYERS} experts" in caplog.text
    assert "--ram" in caplog.text
    for _ in range(2):
        for key in keys(pack):
            assert torch.equal(brought(tier, *key), pack.record(*key))
            tier.disk.pool.check_integrity()
    tier.close()
    assert not pinner.held


def test_buffers_that_cannot_be_pinned_are_used_all_the_same(
    pack: Pack, caplog: pytest.LogCaptureFixture
) -> None:
    tier = HostTier(pack, 0, Limited(0), same_rate)
    assert not tier.pinned
    assert "three times slower" in caplog.text
    assert torch.equal(brought(tier, 1, 2), pack.record(1, 2))
    tier.close()


class Gated(RecordFiles):
    """Reads that wait for a gate, and a list of the order in which they began."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack)
        self.gate = threading.Semaphore(0)
        self.order: list[tuple[int, int]] = []

    def read(self, layer: int, expert: int, into: Tensor, *, cached: bool = True) -> None:
        self.order.append((layer, expert))
        assert self.gate.acquire(timeout=10)
        super().read(layer, expert, into, cached=cached)


def until(met: Callable[[], object]) -> None:
    limit = time.monotonic() + 10
    while not met():
        assert time.monotonic() < limit, "never happened"
        time.sleep(0.001)


@pytest.fixture
def disk(pack: Pack) -> Iterator[tuple[DiskTier, Gated]]:
    """Three buffers, one reader."""
    files = Gated(pack)
    tier = DiskTier(files, [own_memory(pack.info.slot_bytes) for _ in range(3)], readers=1)
    yield tier, files
    files.gate.release(1000)
    tier.close()


def done(tier: DiskTier, read: Read) -> None:
    until(lambda: tier.wait(read, 0.01))


def test_urgent_reads_begin_before_guesses(disk: tuple[DiskTier, Gated]) -> None:
    tier, files = disk
    first = tier.want(0, 0, urgent=False)
    until(lambda: files.order)  # the reader has begun it
    guess = tier.want(0, 1, urgent=False)
    asked = tier.want(0, 2, urgent=True)
    files.gate.release(3)
    for read in (first, asked, guess):
        done(tier, read)
    assert files.order == [(0, 0), (0, 2), (0, 1)]


def test_a_guess_that_somebody_waits_for_overtakes_the_others(disk: tuple[DiskTier, Gated]) -> None:
    tier, files = disk
    reads = [tier.want(0, expert, urgent=False) for expert in range(3)]
    until(lambda: files.order)
    tier.urge(reads[2])
    files.gate.release(3)
    for read in reads:
        done(tier, read)
    assert files.order == [(0, 0), (0, 2), (0, 1)]


def test_a_guess_nobody_began_is_never_read_once_released(disk: tuple[DiskTier, Gated]) -> None:
    tier, files = disk
    first = tier.want(0, 0, urgent=False)
    until(lambda: files.order)
    tier.release(tier.want(0, 1, urgent=False))
    files.gate.release(1)
    done(tier, first)
    time.sleep(0.02)
    assert files.order == [(0, 0)]
    tier.pool.check_integrity()


def test_a_record_wanted_twice_is_read_once_and_stays_for_both(
    pack: Pack, disk: tuple[DiskTier, Gated]
) -> None:
    tier, files = disk
    reads = [tier.want(1, 5, urgent=urgent) for urgent in (False, True)]
    files.gate.release(1)
    done(tier, reads[0])
    again = tier.want(1, 5, urgent=True)
    assert again.ready
    assert files.order == [(1, 5)]
    for read in (*reads, again):
        assert torch.equal(tier.bytes_of(read), pack.record(1, 5))
        tier.release(read)
    tier.pool.check_integrity()


def test_a_held_buffer_is_not_taken_and_a_release_lets_reading_go_on(
    pack: Pack, disk: tuple[DiskTier, Gated]
) -> None:
    tier, files = disk
    files.gate.release(1000)
    held = [tier.want(0, expert, urgent=True) for expert in range(3)]
    for read in held:
        done(tier, read)
    fourth = tier.want(1, 0, urgent=True)
    assert not tier.wait(fourth, 0.05)
    tier.release(held[1])
    done(tier, fourth)
    assert fourth.buffer == held[1].buffer
    for read, key in ((held[0], (0, 0)), (fourth, (1, 0)), (held[2], (0, 2))):
        assert torch.equal(tier.bytes_of(read), pack.record(*key))
    tier.pool.check_integrity()


def test_a_damaged_record_is_reported_to_whoever_wants_it_and_reading_goes_on(
    mixtral_pack: Path, tmp_path: Path
) -> None:
    pack = damaged(mixtral_pack, tmp_path / "pack")
    tier = HostTier(pack, 0, Limited(), same_rate)
    for _ in range(2):
        with pytest.raises(PackError, match=r"experts-00001.*expert 0"):
            brought(tier, 1, 0)
    assert tier.disk is not None
    tier.disk.pool.check_integrity()
    for key in keys(pack):
        if key != (1, 0):
            assert torch.equal(brought(tier, *key), pack.record(*key))
    tier.close()


def test_after_ctrl_c_anywhere_starting_over_works(pack: Pack) -> None:
    """Before every instruction of asking and releasing; a lock left taken would hang."""
    tier = HostTier(pack, 0, Limited(), same_rate)
    disk = tier.disk
    assert disk is not None
    at, interrupted = 0, True

    def work() -> None:
        read = disk.want(0, 1, urgent=True)
        while not disk.wait(read, 1.0):
            pass
        disk.release(read)

    while interrupted:
        interrupted = interrupt_before(work, at)

        def go_on() -> None:
            disk.start_over()
            assert torch.equal(brought(tier, 2, 3), pack.record(2, 3))
            disk.pool.check_integrity()

        after = threading.Thread(target=go_on, daemon=True)
        after.start()
        after.join(10)
        assert not after.is_alive(), f"hangs after Ctrl-C at instruction {at}"
        disk.start_over()
        at += 1
    assert at > 20
    tier.close()


def test_closing_ends_the_threads(pack: Pack) -> None:
    before = threading.active_count()
    tier = HostTier(pack, 0, Limited(), same_rate)
    assert tier.disk is not None
    for expert in range(3):
        tier.disk.want(0, expert, urgent=False)
    tier.close()
    assert threading.active_count() == before
