"""Where each expert's record is in host memory, for a GPU to fetch."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from offload.quant.pack import Pack
from offload.transfer.disk_tier import DiskTier, Read, RecordFiles
from offload.transfer.memory import CudaPinner, mapped_file, own_memory, pages_of
from offload.units import gib

logger = logging.getLogger("offload")

SAMPLE = 64 << 20  # bytes of the sample that each way of holding records is tried with
ENOUGH = 0.95  # of a copy's rate: if the files' own pages reach it, they are used; they cost no RAM
LEAST_BUFFERS = 4  # of the disk tier, however little RAM was given
ALIGNMENT = 256  # bytes; a buffer begins at a multiple of it, as memory of CUDA does
PIECE = 1 << 30  # bytes pinned at a time, of the disk tier's buffers


class HostTier:
    """The records of a pack in host memory, pinned if that is allowed.

    If all records fit, either the pages in which the system has the files are pinned (no copy, no
    second memory, but many systems refuse to pin pages that may not be written) or a copy in memory
    of our own. A private mapping is no third way, since pinning one copies it page by page. If not
    all fit, buffers of our own hold the most valuable records, and the disk the others.

    Users `join` and `leave`; the last to leave frees everything.
    """

    def __init__(
        self, pack: Pack, ram: int, pinner: CudaPinner, rate: Callable[[Tensor], float]
    ) -> None:
        """`rate` measures how many bytes/s are copied to the GPU from given memory, to choose the
        quicker of the two ways by. Raises `PackError`, and then nothing stays pinned."""
        self._pack, self._pinner, self._rate = pack, pinner, rate
        self._files = RecordFiles(pack)
        self._users: list[Callable[[], None] | None] = []
        self.description = ""  # how records are held, in a few words
        self.disk: DiskTier | None = None  # None: RAM holds every record
        self._records: list[Tensor] = []  # [E, record_bytes] of a layer
        self._in_place: list[bool] = []  # of a layer: the files' own pages, which others may write
        self.pinned = False  # whether a GPU can fetch every record that is in memory by itself
        with contextlib.ExitStack() as undo:
            self._undo = undo
            if pack.info.expert_bytes <= ram:
                self._hold_all()
            else:
                self._hold_some(ram)
            self._undo = undo.pop_all()

    def record(self, layer: int, expert: int, read: Read | None = None) -> Tensor:
        """The checked record [record_bytes] uint8. Raises `PackError`.

        Where RAM does not hold every record, it is the one that `read` of `disk` brought.
        """
        if self.disk is not None:
            assert read is not None, "records come from the disk: ask `disk` first"
            return self.disk.bytes_of(read)
        record = self._records[layer][expert]
        if self._in_place[layer]:
            self._pack.check_unchanged(layer)
        self._files.check(layer, expert, record)
        return record

    def join(self, go_on: Callable[[], None] | None = None) -> None:
        """Count one more user. Its `go_on` releases the buffers whose copies are complete (None:
        this user never holds a buffer)."""
        self._users.append(go_on)

    def leave(self, go_on: Callable[[], None] | None = None) -> None:
        """Count one user fewer. When nobody is left, unpin and free."""
        self._users.remove(go_on)
        if not self._users:
            self.close()

    def go_on(self) -> None:
        """Let every user release the buffers it is done with, since somebody waits for one."""
        for user in self._users:
            if user is not None:
                user()

    def close(self) -> None:
        """End the threads, unpin, free."""
        self._undo.close()
        self._records.clear()

    def _hold_all(self) -> None:
        in_place, refused_in_place = self._try_way(mapped=True)
        copied, refused_copied = self._try_way(mapped=False)
        layers = self._pack.info.layers
        if in_place or copied:
            better = in_place >= ENOUGH * copied
            where = "in the files' own pages" if better else "as a copy"
            self.description = (
                f"pinned {where} ({_way('in place', in_place, refused_in_place)}, "
                f"{_way('copied', copied, refused_copied)})"
            )
            refused = self._fill(mapped=better)
        else:
            self.description, refused = "not pinned", refused_copied
        self.pinned = not refused
        if refused:
            self._warn_unpinned(sum(records.nbytes for records in self._records), refused)
        for layer in range(len(self._records), len(layers)):
            self._records.append(self._memory(layer, layers[layer].num_experts, mapped=True))
            self._in_place.append(True)
        logger.info("%s of experts in RAM, %s", gib(self._pack.info.expert_bytes), self.description)

    def _try_way(self, *, mapped: bool) -> tuple[float, str]:
        """The rate at which a sample held this way is copied, or 0 and why it cannot be pinned."""
        experts = self._pack.info.layers[0].num_experts
        count = min(experts, max(1, SAMPLE // self._files.size(0)))
        sample = self._memory(0, count, mapped=mapped)
        if refused := self._pinner.pin(*pages_of(sample), read_only=mapped):
            return 0.0, refused
        try:
            return self._rate(sample.view(-1)), ""
        finally:
            self._pinner.unpin(*pages_of(sample))

    def _memory(self, layer: int, experts: int, *, mapped: bool) -> Tensor:
        """Memory [experts, record_bytes] for a layer's records: `mapped`, it is the files' own
        pages; otherwise it is memory of our own, into which nothing was read yet."""
        size = self._files.size(layer)
        if not mapped:
            return own_memory(experts * size).view(experts, size)
        path, begin = self._pack.place(layer, 0)
        return mapped_file(path)[begin : begin + experts * size].view(experts, size)

    def _fill(self, *, mapped: bool) -> str | None:
        """Hold, check and pin layer by layer; the reason if a layer could not be pinned."""
        read = self._files.check if mapped else self._files.read
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for index, layer in enumerate(self._pack.info.layers):
                records = self._memory(index, layer.num_experts, mapped=mapped)
                if refused := self._pin(records, read_only=mapped):
                    return refused
                each = range(layer.num_experts)
                for _ in threads.map(functools.partial(read, index), each, records):
                    pass
                self._records.append(records)
                self._in_place.append(mapped)
        return None

    def _hold_some(self, ram: int) -> None:
        info = self._pack.info
        stride = -(-info.slot_bytes // ALIGNMENT) * ALIGNMENT
        count = min(max(ram // stride, LEAST_BUFFERS), info.total_experts)
        per_piece = max(1, PIECE // stride)
        buffers: list[Tensor] = []
        refused: str | None = None
        while len(buffers) < count:
            piece = own_memory(min(per_piece, count - len(buffers)) * stride)
            if refused is None:
                refused = self._pin(piece, read_only=False)
                if refused is not None:
                    self._warn_unpinned(len(buffers) * stride, refused)
            buffers += piece.view(-1, stride)
        logger.warning(
            "RAM holds %d of %d experts (%s of %s), and the others are read from disk when needed: "
            "raise --ram or lower --expert-bits",
            count,
            info.total_experts,
            gib(count * stride),
            gib(info.expert_bytes),
        )
        self.description = f"{count} of {info.total_experts} experts in RAM"
        self.pinned = refused is None
        self.disk = DiskTier(self._files, buffers)
        self._undo.callback(self.disk.close)

    def _pin(self, memory: Tensor, *, read_only: bool) -> str | None:
        """Pin `memory` until this tier is closed; None, or why it is refused."""
        address, size = pages_of(memory)
        refused = self._pinner.pin(address, size, read_only=read_only)
        if refused is None:
            self._undo.callback(self._pinner.unpin, address, size)
        return refused

    def _warn_unpinned(self, pinned_bytes: int, refused: str) -> None:
        logger.warning(
            "only %s of RAM can be pinned (%s), and copies from the rest will be about three times "
            "slower: %s",
            gib(pinned_bytes),
            refused,
            self._pinner.remedy,
        )


def _way(name: str, rate: float, refused: str) -> str:
    return f"{name} {rate / 1e9:.1f} GB/s" if rate else f"{name} refused: {refused}"
