"""Making a pack gives the same bytes after interruptions, kills, full disks and for two at once."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from offload.quant.errors import PackError
from offload.quant.manifest import MANIFEST, is_pack
from offload.quant.pack import Pack, PackInfo, PackLayer
from offload.quant.pack_writer import PackWriter
from tests.quant.packs import (
    CONFIG,
    DENSE,
    FORK,
    contents,
    make_info,
    needs_fork,
    record_of,
    records,
    write_pack,
)

FIRST = PackLayer.file_name(0)
SECOND = PackLayer.file_name(1)
REMEDY = re.compile(r"delete|remove|load the model|name (another|a)|choose|free some|use ")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pack that was made in one go."""
    path = tmp_path_factory.mktemp("packs") / "pack"
    write_pack(path, make_info())
    return contents(path)


def test_pack_holds_its_files_and_nothing_else(uninterrupted: dict[str, bytes]) -> None:
    layers = {PackLayer.file_name(layer) for layer in range(3)}
    assert uninterrupted.keys() == {MANIFEST, CONFIG, DENSE, *layers}


def test_pack_is_byte_identical_each_time(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    write_pack(tmp_path / "pack", make_info())
    assert contents(tmp_path / "pack") == uninterrupted


def test_making_a_pack_makes_its_parent_folders(tmp_path: Path) -> None:
    write_pack(tmp_path / "a" / "b" / "pack", make_info())
    assert is_pack(tmp_path / "a" / "b" / "pack")


def test_nothing_is_left_beside_the_pack(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", make_info())
    assert [entry.name for entry in tmp_path.iterdir()] == ["pack"]


def test_finished_pack_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    assert write_pack(path, make_info()) == [0, 1, 2]
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert write_pack(path, make_info()) == []
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


# --- interruption ---


class Stopped(BaseException):
    """Like KeyboardInterrupt, this is no `Exception`."""


def stopping_after(records: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for index, record in enumerate(records):
        if index == count:
            raise Stopped
        yield record


def stop_in_layer(path: Path, info: PackInfo, layer: int, expert: int) -> None:
    """Write until `expert` of `layer` is asked for, and raise there."""
    with contextlib.suppress(Stopped), PackWriter(path, info) as writer:
        for index in range(layer):
            writer.write_layer(index, records(info, index))
        writer.write_layer(layer, stopping_after(records(info, layer), expert))
        pytest.fail("was not stopped")


@pytest.mark.parametrize("expert", [0, 2])
def test_layer_that_was_interrupted_leaves_no_pack(tmp_path: Path, expert: int) -> None:
    path = tmp_path / "pack"
    stop_in_layer(path, make_info(), layer=1, expert=expert)
    assert not path.exists()
    assert not is_pack(path)


def test_finished_layers_are_kept_and_the_interrupted_one_is_not(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    path = tmp_path / "pack"
    stop_in_layer(path, make_info(), layer=1, expert=2)
    with PackWriter(path, make_info()) as writer:
        assert not writer.done
        assert writer.has(FIRST)
        assert not writer.has(SECOND)
    assert write_pack(path, make_info()) == [1, 2]
    assert contents(path) == uninterrupted


def test_layers_of_other_settings_are_not_thrown_away(tmp_path: Path) -> None:
    """They may be hours of work, and the other settings may be a typing error."""
    path, info, other = tmp_path / "pack", make_info(), make_info(group_size=32)
    stop_in_layer(path, info, layer=2, expert=1)
    partial = tmp_path / "pack.partial"
    before = contents(partial)
    with pytest.raises(
        PackError, match=r"pack\.partial is an interrupted pack with other settings"
    ):
        write_pack(path, other)
    assert contents(partial) == before
    assert write_pack(path, info) == [2]


def test_other_settings_start_afresh_where_nothing_was_finished(tmp_path: Path) -> None:
    path, other = tmp_path / "pack", make_info(group_size=32)
    stop_in_layer(path, make_info(), layer=0, expert=1)
    assert write_pack(path, other) == [0, 1, 2]
    assert Pack(path).info == other
    write_pack(tmp_path / "plain", other)
    assert contents(path) == contents(tmp_path / "plain")


def test_a_file_of_an_earlier_run_that_this_pack_has_not_is_left_out(tmp_path: Path) -> None:
    """A chat template may leave the checkpoint between a kill and the next run."""
    path, info = tmp_path / "pack", make_info()
    with contextlib.suppress(Stopped), PackWriter(path, info) as writer:
        writer.write_file("chat_template.jinja", b"old")
        raise Stopped
    write_pack(path, info)
    assert not (path / "chat_template.jinja").exists()
    Pack(path).close()


class Fuse:
    """Stops the program just before or just after its n-th disk operation."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
        self.left = at
        self.after = after
        self.blown = ""
        for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (os, "fsync")):
            patch.setattr(owner, name, self.guarded(name, getattr(owner, name)))

    def guarded(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                self.blow(name, args)
            result = operation(*args, **options)
            if self.left == 0 and self.after:
                self.blow(name, args)
            return result

        return run

    def blow(self, name: str, args: tuple[Any, ...]) -> None:
        names = [arg.name for arg in args if isinstance(arg, Path)]
        self.blown = f"{'after' if self.after else 'before'} {name}{names}"
        raise Stopped


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_pack_is_the_same_wherever_its_making_was_stopped(
    tmp_path: Path, uninterrupted: dict[str, bytes], after: bool
) -> None:
    wrong = []
    for at in range(1, 100):
        path = tmp_path / str(at) / "pack"
        with pytest.MonkeyPatch.context() as patch:
            fuse = Fuse(patch, at, after=after)
            with contextlib.suppress(Stopped):
                write_pack(path, make_info())
        if not fuse.blown:
            break
        if path.exists():
            Pack(path)
        write_pack(path, make_info())
        if contents(path) != uninterrupted:
            extra = contents(path).keys() ^ uninterrupted.keys()
            wrong.append(f"{fuse.blown}: {sorted(extra) or 'other bytes'}")
    assert 10 < at < 99, "the fuse was meant to blow at every operation"
    assert not wrong


# --- processes ---


def child_makes_pack(path: Path, started: Connection, pause_seconds: float) -> None:
    info = make_info(layers=5)
    write_pack(path, info, pause_seconds=pause_seconds, started=lambda: started.send("started"))
    Pack(path)


def start_making(path: Path, pause_seconds: float) -> tuple[Any, Connection]:
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child_makes_pack, args=(path, there, pause_seconds))
    process.start()
    there.close()
    return process, here


@needs_fork
def test_killed_at_any_moment_the_pack_comes_out_the_same(tmp_path: Path) -> None:
    info, pause_seconds = make_info(layers=5), 0.002
    begin = time.perf_counter()
    write_pack(tmp_path / "plain", info, pause_seconds=pause_seconds)
    usual_seconds = time.perf_counter() - begin
    expected = contents(tmp_path / "plain")
    chooser = random.Random(0)
    path = tmp_path / "pack"
    killed = 0
    for attempt in range(40):
        process, started = start_making(path, pause_seconds)
        assert started.poll(30), "the child did not start"
        time.sleep(chooser.uniform(0, 0.7 * usual_seconds))
        process.kill()
        process.join()
        killed += process.exitcode < 0
        if path.exists():  # it was finished before: begin another one
            assert contents(path) == expected
            path = tmp_path / f"pack-{attempt}"
        if killed >= 10:
            break
    assert killed >= 10
    write_pack(path, info)
    assert contents(path) == expected


@needs_fork
def test_two_processes_that_make_one_pack_both_end_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    makers = [start_making(path, pause_seconds=0.002) for _ in range(2)]
    for process, _ in makers:
        process.join(30)
        assert process.exitcode == 0
    write_pack(tmp_path / "plain", make_info(layers=5))
    assert contents(path) == contents(tmp_path / "plain")


@needs_fork
def test_killed_process_does_not_keep_others_waiting(tmp_path: Path) -> None:
    process, started = start_making(tmp_path / "pack", pause_seconds=5)
    assert started.poll(30)
    process.kill()
    process.join()
    write_pack(tmp_path / "pack", make_info(layers=5))
    assert is_pack(tmp_path / "pack")


@needs_fork
def test_waiting_for_another_process_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pack"
    process, started = start_making(path, pause_seconds=0.01)
    assert started.poll(30)
    with PackWriter(path, make_info(layers=5)) as writer:
        assert writer.done
    process.join(30)
    assert str(path) in caplog.text
    assert "waiting" in caplog.text


# --- the disk ---


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("healthy", [0, 1, 2, 4, 5])
def test_full_disk_is_said_and_leaves_no_pack(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, bytes],
    healthy: int,
) -> None:
    """Make the disk full after `healthy` files."""
    path = tmp_path / "pack"
    real, left = os.fsync, healthy

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            fail_with(errno.ENOSPC)()
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(PackError, match="disk is full") as caught:
            write_pack(path, make_info())
    assert str(path) in str(caught.value)
    assert REMEDY.search(str(caught.value))
    assert not path.exists()
    write_pack(path, make_info())
    assert contents(path) == uninterrupted


class FullDisk:
    """A file that takes no more than `room` bytes."""

    def __init__(self, handle: Any, room: int) -> None:
        self.handle = handle
        self.room = room

    def close(self) -> None:
        self.handle.close()

    def write(self, data: bytes | memoryview) -> int:
        self.room -= len(data)
        if self.room < 0:
            fail_with(errno.ENOSPC)()
        return int(self.handle.write(data))


def test_disk_that_fills_up_within_a_layer_keeps_the_layers_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    path, info = tmp_path / "pack", make_info()
    real = Path.open

    def open_with_little_room(file: Path, mode: str = "r", **options: Any) -> Any:
        handle = real(file, mode, **options)
        return FullDisk(handle, room=5000) if mode == "wb" else handle

    with PackWriter(path, info) as writer:
        writer.write_layer(0, records(info, 0))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_with_little_room)
            with pytest.raises(PackError, match="disk is full"):
                writer.write_layer(1, records(info, 1))
    assert not path.exists()
    assert write_pack(path, info) == [1, 2]
    assert contents(path) == uninterrupted


def test_place_that_cannot_be_written_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "pack"
    with (
        pytest.raises(PackError, match=re.escape(str(path))) as caught,
        PackWriter(path, make_info()),
    ):
        pass
    assert REMEDY.search(str(caught.value)), f"no remedy: {caught.value}"


def test_input_output_error_is_ours_and_names_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pack"
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(PackError, match=re.escape(str(path))):
        write_pack(path, make_info())
    assert not path.exists()


def test_error_in_reading_the_source_is_not_called_an_error_in_writing_the_pack(
    tmp_path: Path,
) -> None:
    path, info = tmp_path / "pack", make_info()

    def unreadable() -> Iterator[Tensor]:
        yield record_of(info, 0, 0)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "model.safetensors")

    with (
        pytest.raises((OSError, PackError)) as caught,
        PackWriter(path, info) as writer,
    ):
        writer.write_layer(0, unreadable())
    assert "cannot write" not in str(caught.value)
    assert "model.safetensors" in str(caught.value)


# --- what else may lie there ---


def test_pack_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    write_pack(path, make_info())
    before = contents(path)
    with pytest.raises(PackError, match="something else") as caught:
        write_pack(path, make_info(group_size=32))
    assert "remove" not in str(caught.value), "it may be worth keeping"
    assert str(path) in str(caught.value)
    assert REMEDY.search(str(caught.value))
    assert contents(path) == before


def test_damaged_pack_is_reported_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    write_pack(path, make_info())
    (path / DENSE).write_bytes(b"")
    with pytest.raises(PackError, match=DENSE):
        write_pack(path, make_info())
    assert (path / DENSE).read_bytes() == b""


@pytest.mark.parametrize("size", [1, 100, 9000])
def test_full_disk_is_told_whatever_is_written(small_disk: Path, size: int) -> None:
    """Closing a file tries to write again what could not be written, and fails again."""
    with PackWriter(small_disk / "pack", make_info()) as writer:
        filler = (small_disk / "filler").open("wb", buffering=0)
        with filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)) == 4096:
                pass
        with pytest.raises(PackError, match="the disk is full"):
            writer.write_file("small.json", bytes(size))


@pytest.mark.parametrize("settings", [b"{}", b"\xff\xfe", b""])
def test_partial_with_damaged_settings_and_nothing_finished_is_begun_anew(
    tmp_path: Path, settings: bytes
) -> None:
    path, info = tmp_path / "pack", make_info()
    partial = tmp_path / "pack.partial"
    partial.mkdir()
    (partial / ".settings").write_bytes(settings)
    (partial / "half.part").write_bytes(b"of other settings")
    with PackWriter(path, info) as writer:
        assert not any(writer.has(PackLayer.file_name(layer)) for layer in range(3))
        assert sorted(contents(partial)) == [".settings"]
    write_pack(path, info)
    assert Pack(path).info == info


@pytest.mark.parametrize("left", [set(), {".settings.part"}])
def test_partial_killed_at_its_very_beginning_is_begun_anew(tmp_path: Path, left: set[str]) -> None:
    path, info = tmp_path / "pack", make_info()
    (tmp_path / "pack.partial").mkdir()
    for name in left:
        (tmp_path / "pack.partial" / name).write_bytes(b'{"half')
    write_pack(path, info)
    assert Pack(path).info == info


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_partial_that_is_not_ours_is_never_removed(tmp_path: Path, kind: str) -> None:
    path, partial, mine = tmp_path / "pack", tmp_path / "pack.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("precious")
    if kind == "folder":
        mine.rename(partial)
    elif kind == "file":
        partial.write_text("precious")
    else:
        partial.symlink_to(mine)
    with pytest.raises(PackError, match=r"pack(\.partial)?") as caught:
        write_pack(path, make_info())
    assert REMEDY.search(str(caught.value))
    kept = partial if kind == "file" else partial / "letter.txt"
    assert kept.read_text() == "precious"


def test_link_to_an_empty_folder_in_place_of_the_partial_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "pack.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(PackError, match="cannot write"):
        write_pack(tmp_path / "pack", make_info())
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("kind", ["proc", "folder", "dangling link", "missing parent"])
def test_lock_that_cannot_be_made_is_told_at_once(tmp_path: Path, kind: str) -> None:
    """filelock would take some of these errors for a lock that another process holds."""
    path = tmp_path / "pack"
    if kind == "proc":
        path = Path("/proc/pack")
    elif kind == "folder":
        (tmp_path / "pack.lock").mkdir()
    elif kind == "dangling link":
        (tmp_path / "pack.lock").symlink_to(tmp_path / "nowhere" / "else")
    else:
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "pack"
    told: list[BaseException] = []

    def enter() -> None:
        try:
            with PackWriter(path, make_info()):
                pass
        except BaseException as error:
            told.append(error)

    waiting = threading.Thread(target=enter, daemon=True)
    waiting.start()
    waiting.join(10)
    assert [type(error) for error in told] == [PackError]
    assert f"cannot write {path}" in str(told[0])


def test_folder_of_something_else_is_refused_before_any_work(tmp_path: Path) -> None:
    """Quantising takes hours, so what is wrong at the start is reported then."""
    path = tmp_path / "pack"
    path.mkdir()
    (path / "letter.txt").write_text("precious")
    with pytest.raises(PackError) as caught, PackWriter(path, make_info()):
        pytest.fail("the writer was ready to write")
    assert str(path) in str(caught.value)
    assert REMEDY.search(str(caught.value))
    assert contents(path) == {"letter.txt": b"precious"}


@pytest.mark.parametrize("name", ["manifest.json", "settings.json"])
def test_checkpoints_file_named_like_one_of_ours_does_not_spoil_the_pack(
    tmp_path: Path, name: str
) -> None:
    """Every *.json of a checkpoint is copied, whatever its name."""
    path, info = tmp_path / "pack", make_info()
    with PackWriter(path, info) as writer:  # left before it is finished
        for layer in range(3):
            writer.write_layer(layer, records(info, layer))
        writer.write_file(name, b'{"of": "the checkpoint"}')
    assert write_pack(path, info) == [], "finished layers were kept"
    assert Pack(path).info == info


# --- tensors ---


def test_tensors_of_every_kind_and_size_are_opened_by_safetensors(tmp_path: Path) -> None:
    """The sizes include an odd number of bytes before a float, a scalar, and an empty tensor."""
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.arange(3).bfloat16(),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }
    kinds = {
        torch.bool: "BOOL",
        torch.float32: "F32",
        torch.int64: "I64",
        torch.uint8: "U8",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
    }
    path, info = tmp_path / "pack", make_info()
    with PackWriter(path, info) as writer:
        for layer in range(3):
            writer.write_layer(layer, records(info, layer))
        writer.write_tensors(
            DENSE,
            [
                (name, kinds[t.dtype], tuple(t.shape), t.contiguous().view(-1).view(torch.uint8))
                for name, t in tensors.items()
            ],
        )
        writer.write_tensors("model-00002.safetensors", [])
        writer.finish()
    with safe_open(path / DENSE, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
    with safe_open(path / "model-00002.safetensors", "pt") as file:
        assert list(file.keys()) == []
    Pack(path)
