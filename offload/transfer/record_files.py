"""Reading whole records from a pack's files, past the mapping.

Knows: which bytes a record is, checksums at the first reading, whether its file is still what it
was. Does not know: where the bytes are kept (`offload.host_tier`, `offload.disk_tier`), nor which
are wanted.

A mapping is read a fault at a time, where one read of a whole record keeps a disk busy: docs/log.md
compares them.
"""

from __future__ import annotations

import contextlib
import os

from torch import Tensor

from offload.quant.pack import Pack, as_buffer


class RecordFiles:
    """The records of a pack as its files have them. For use by several threads at once."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._checked = [bytearray(layer.num_experts) for layer in pack.info.layers]

    def size(self, layer: int) -> int:
        return self._pack.info.layout_of(layer).record_bytes

    def read(self, layer: int, expert: int, into: Tensor, *, cached: bool = True) -> None:
        """Read a record into `into` [>= record_bytes] uint8. Raises `PackError`, also when its file
        was written to since the pack was opened: a checksum is compared once only.

        With `cached` False the system need not keep the bytes as well: the caller does.
        """
        _, begin = self._pack.place(layer, expert)
        target = into[: self.size(layer)]
        self._pack.read_at(layer, begin, as_buffer(target))
        if not cached and hasattr(os, "posix_fadvise"):
            file, size = self._pack.descriptor(layer), target.numel()
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(file, begin, size, os.POSIX_FADV_DONTNEED)
        self._pack.check_unchanged(layer)  # afterwards: a write may come between
        self.check(layer, expert, target)

    def check(self, layer: int, expert: int, record: Tensor) -> None:
        """Compare a record with its checksum, the first time. Raises `PackError`."""
        if not self._checked[layer][expert]:
            self._pack.check_record(layer, expert, record)
            self._checked[layer][expert] = 1
