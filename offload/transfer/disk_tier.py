"""The tier before the disk, for models larger than RAM: host buffers that threads fill."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from torch import Tensor

from offload.cache.policies import LFRU, Key
from offload.cache.slots import RecordPool
from offload.errors import TransferError
from offload.quant.pack import Pack, as_buffer
from offload.transfer.order import UrgentFirst


class RecordFiles:
    """The records of a pack as its files have them. For use by several threads at once."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._checked = [bytearray(layer.num_experts) for layer in pack.info.layers]

    def size(self, layer: int) -> int:
        return self._pack.info.layout_of(layer).record_bytes

    def read(self, layer: int, expert: int, into: Tensor, *, cached: bool = True) -> None:
        """Read a record into `into` [>= record_bytes] uint8.

        With `cached` False the system is told that it need not keep the bytes. Raises `PackError`,
        also when the file was written to since the pack was opened: its checksum is compared only
        the first time.
        """
        _, begin = self._pack.place(layer, expert)
        target = into[: self.size(layer)]
        self._pack.read_at(layer, begin, as_buffer(target))
        if not cached and hasattr(os, "posix_fadvise"):
            file, size = self._pack.descriptor(layer), target.numel()
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(file, begin, size, os.POSIX_FADV_DONTNEED)
        self._pack.check_unchanged(layer)  # after reading: a write may come in between
        self.check(layer, expert, target)

    def check(self, layer: int, expert: int, record: Tensor) -> None:
        """Compare a record with its checksum, the first time. Raises `PackError`."""
        if not self._checked[layer][expert]:
            self._pack.check_record(layer, expert, record)
            self._checked[layer][expert] = 1


READERS = 4  # reads at a time that keep a disk busy (docs/log/host-tier.md)


class Read:
    """A record on its way into a buffer, where it stays until every `want` was released."""

    __slots__ = ("bell", "buffer", "error", "key", "ready", "urgent", "wanted")

    def __init__(self, key: Key, urgent: bool) -> None:
        self.key, self.urgent = key, urgent
        self.ready = False
        self.wanted = 1
        self.buffer: int | None = None
        self.error: Exception | None = None
        self.bell = threading.Lock()  # released once, after `ready` was set
        self.bell.acquire()


class _Shelf:
    """What the readers and the asking thread share, under one lock.

    `start_over` throws a shelf away as a whole, because Ctrl-C may leave it in any state, even with
    its lock taken.
    """

    def __init__(self, buffers: int) -> None:
        self.lock = threading.Lock()
        self.pool = RecordPool(buffers, LFRU)
        self.reading: dict[Key, Read] = {}  # asked for, not there yet
        self.waiting: UrgentFirst[Read] = UrgentFirst()
        self.abandoned = False

    def next(self) -> Read | None:
        """The read to begin, with its buffer; None: nothing to read, or every buffer is held."""
        read = self.waiting.first()
        if read is None:
            return None
        # The buffer that `place` gives is held for the reader; each that wants it holds it, too.
        read.buffer = self.pool.place(read.key, 1.0 if read.urgent else 0.0)
        if read.buffer is None:
            return None
        for _ in range(read.wanted):
            self.pool.hold(read.key)
        return self.waiting.pop()

    def over(self, read: Read) -> None:
        """Note that the reader is done with `read`."""
        del self.reading[read.key]
        if read.error is None:
            self.pool.release(read.key)
        else:
            self.pool.forget(read.key)

    def urge(self, read: Read) -> None:
        """Make a guess urgent, since somebody waits for it, unless a reader has begun it."""
        if not read.urgent and read.buffer is None:
            self.waiting.urge(read)
            read.urgent = True


class DiskTier:
    """Buffers for fewer records than there are, filled from the files by threads.

    One thread asks and releases; a record that is wanted twice is read once. After an interrupted
    call: `start_over`.
    """

    def __init__(
        self, files: RecordFiles, buffers: Sequence[Tensor], *, readers: int = READERS
    ) -> None:
        self._files, self._buffers = files, buffers
        self._shelf = _Shelf(len(buffers))
        self._wake: SimpleQueue[bool] = SimpleQueue()  # True: look at the queues, False: end
        self._busy = [False] * readers
        self._threads = [
            threading.Thread(target=self._run, args=(n,), name=f"offload-read-{n}", daemon=True)
            for n in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pool(self) -> RecordPool:
        return self._shelf.pool

    def want(self, layer: int, expert: int, *, urgent: bool) -> Read:
        """Ask for a record; it is read as soon as a reader and a buffer are free."""
        key, shelf = (layer, expert), self._shelf
        with shelf.lock:
            read = shelf.reading.get(key)
            if read is not None:
                read.wanted += 1
                if read.buffer is not None:
                    shelf.pool.hold(key)
                elif urgent:
                    shelf.urge(read)
                return read
            read = Read(key, urgent)
            read.buffer = shelf.pool.find(key, 1.0 if urgent else 0.0)
            if read.buffer is not None:
                read.ready = True
                return read
            shelf.reading[key] = read
            shelf.waiting.add(read, urgent=urgent)
        self._wake.put(True)
        return read

    def urge(self, read: Read) -> None:
        """Somebody waits for a read that was a guess."""
        with self._shelf.lock:
            self._shelf.urge(read)

    def bytes_of(self, read: Read) -> Tensor:
        """The record [record_bytes] uint8. Raises what reading it raised."""
        if read.error is not None:
            raise read.error
        assert read.ready, "not read yet"
        assert read.buffer is not None
        return self._buffers[read.buffer][: self._files.size(read.key[0])]

    def release(self, read: Read) -> None:
        """Note that one of those who wanted the record is done with it or no longer wants it."""
        shelf = self._shelf
        with shelf.lock:
            read.wanted -= 1
            if read.error is not None:
                return
            if read.buffer is not None:
                shelf.pool.release(read.key)
            elif not read.wanted:
                shelf.waiting.remove(read)
                del shelf.reading[read.key]
        self._wake.put(True)  # a read may have found every buffer held

    def wait(self, read: Read, seconds: float) -> bool:
        """Wait until the read is over or so many seconds passed; return whether it is over."""
        if not read.ready:
            read.bell.acquire(timeout=seconds)
            if not read.ready and not any(thread.is_alive() for thread in self._threads):
                raise TransferError("no thread reads from disk any more: load the model again")
        return read.ready

    def start_over(self) -> None:
        """Forget everything, once no thread writes into a buffer any more."""
        before = self._shelf
        before.abandoned = True
        while any(self._busy):  # polled: the old shelf's lock may be taken for ever
            time.sleep(0.0005)
        self._shelf = _Shelf(len(self._buffers))

    def close(self) -> None:
        """End the threads. Nothing may be asked for afterwards."""
        self._shelf.abandoned = True
        for _ in self._threads:
            self._wake.put(False)
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        while self._wake.get():
            # Set before the shelf is asked: start_over() abandons it, and replaces it only when no
            # reader is busy.
            self._busy[number] = True
            shelf = self._shelf
            read = self._locked(shelf, shelf.next)
            while read is not None:
                assert read.buffer is not None
                try:
                    self._files.read(*read.key, self._buffers[read.buffer], cached=False)
                except Exception as error:  # handed to whoever waits
                    read.error = error
                self._locked(shelf, functools.partial(shelf.over, read))
                read.ready = True
                read.bell.release()
                read = self._locked(shelf, shelf.next)
            self._busy[number] = False

    @staticmethod
    def _locked(shelf: _Shelf, call: Callable[[], Read | None]) -> Read | None:
        """The result of `call` under the lock; None if the shelf was thrown away meanwhile."""
        while not shelf.abandoned:
            if shelf.lock.acquire(timeout=0.05):
                try:
                    return None if shelf.abandoned else call()
                finally:
                    shelf.lock.release()
        return None
